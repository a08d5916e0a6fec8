"""H of the output head's inputs: what the final norm gives, as `statistics` records a block's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropbydrop.system.distributed import Partition, Ranks

from .block_runner import BlockRunner
from .statistics import InputRecorder


def head_gram(
    runner: BlockRunner, hidden: Tensor, partition: Partition | None = None
) -> Tensor | None:
    """H of the head's inputs, [d, d], tokens weighted as in `collect_statistics`.

    Args:
        hidden: output of the last block, [n, T, D].
        partition: of this process in a run of several; `hidden` has its windows alone.

    Returns:
        None for a model without a linear head.

    Raises:
        CalibrationError: activations that are not finite.
    """
    own = partition or Ranks().partition(runner.shards(*hidden.shape[:2]))
    heads = [runner.model.get_submodule(name) for name in runner.head_modules]
    if not heads or not isinstance(head := heads[0], nn.Linear):
        return None
    with InputRecorder(nn.ModuleDict({"head": head}), "output") as recorder:
        # its products are not needed: once its input is recorded, no token is left of it
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][:, :0],))

        def run() -> None:
            for shard in own.shards:
                for part in shard:
                    x = hidden[part]
                    recorder.batch((x.shape[0], x.shape[1]))
                    with torch.no_grad():
                        runner.logits(x)
                    recorder.end()
                recorder.fold(keep=own.ranks.size > 1)

        try:
            own.ranks.on_all_ranks(run)
        finally:
            handle.remove()
        found = recorder.result(hidden, own, own.count * hidden.shape[1])
    (gram,) = found.grams.values()
    return gram
