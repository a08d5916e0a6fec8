"""Run the decoder blocks of any dense causal LM one after the other, one in memory at a time.

How it works, without a list of architectures:

1. `BlockRunner.open` builds the model of the folder's config with parameters on the meta device (no
   memory) and buffers for real, since rotary frequencies are computed by the model's own code
   (structure.py). The blocks are the outermost `ModuleList` of the text decoder with as many
   entries as the config has layers.
2. What a block receives beside the hidden state (masks, position embeddings, local or global) is
   taken from the model itself: its forward runs once for a batch shape with every block's
   `forward` replaced by a stub (block_inputs.py). No names, no re-implementation of masks. That
   also gives the embedding and, of the last block's output, the logits.
3. `block(i)` loads the weights of block i from safetensors in `dtype`, put together as transformers
   would (key_names.py); `release(i)` puts them back on the meta device. Between the two, a caller
   may change `linear.weight.data`.
4. `collect_statistics` runs a block over all windows, batch by batch, and in the same pass
   accumulates the Gram matrices of its input groups (statistics.py) and the block's output.

Layout: ids [n, T] int64; hidden [n, T, D] in `dtype`, n windows of T tokens without padding. D is
the size of the hidden state, for some families with what else passes between blocks behind it
(block_state.py). Both live where the caller put them (CPU); batches of about `batch_tokens` tokens
go to `device`.

Limits, each refused with UnsupportedModelError: families listed in structure.py, blocks that are
not called exactly once and in order, blocks of which more than 5 % is in no linear layer that is
called once with every token (fused experts), weights that blocks share, weights that the folder
lacks. Encoder-decoders are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from dropbydrop.system.distributed import SHARDS, Partition, Ranks
from dropbydrop.system.errors import FormatError, UnsupportedModelError

from .block_inputs import BlockInputs
from .embeddings import embedding_name, head_name
from .experts import stack_names, walk_experts, weight_of
from .input_groups import InputGroup, codable
from .key_names import KeyNames
from .statistics import (
    CLIP,
    BlockStatistics,
    InputRecorder,
    TokenWeights,
    check_uncovered,
    weights_of,
)
from .structure import build_model, find_blocks, towers
from .weight_files import WeightFiles

BATCH_TOKENS = 4096


class BlockRunner:
    """Block-by-block access to the model of a folder. Open with `BlockRunner.open`.

    Attributes:
        model: the causal LM; parameters on the meta device unless materialised.
        blocks, blocks_name, num_blocks: the list of blocks, its name ("model.layers"), its length.
        embedding_modules, head_modules: full module names, at most one of each.
        tied: whether the head shares the embedding's weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: WeightFiles,
        dtype: torch.dtype,
        device: torch.device,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.model, self.files, self.dtype, self.device = model, files, dtype, device
        self.batch_tokens = batch_tokens
        self._keys = KeyNames(model, files)
        walk_experts(model)
        self.blocks_name, self.blocks = find_blocks(model)
        self.num_blocks = len(self.blocks)
        head = head_name(model)
        self.embedding_modules = [embedding_name(model)]
        self.head_modules = [] if head is None else [head]
        self._ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.tied = any(f"{name}.weight" in self._ties for name in self.head_modules)
        self._outer_loaded: set[str] = set()
        self._towers = tuple(f"{name}." for name in towers(model))
        self._check()
        self._block_inputs = BlockInputs(
            model, self.blocks_name, self.blocks, self._load_outer, device
        )

    @classmethod
    def open(
        cls,
        folder: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_tokens: int = BATCH_TOKENS,
        files: WeightFiles | None = None,
    ) -> BlockRunner:
        """Open a local Hugging Face folder (config.json and safetensors).

        Args:
            files: where the weights are, if not in the folder.

        Raises:
            FormatError: config or weights missing or damaged.
            UnsupportedModelError: a structure beyond the limits of the module's note.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FormatError(f"{folder} has no config.json; give a Hugging Face model folder.")
        files = WeightFiles(folder) if files is None else files
        model = build_model(folder, dtype, device)
        return cls(model, files, dtype, torch.device(device), batch_tokens)

    # ---- structure -------------------------------------------------------------------------

    def block_prefix(self, i: int) -> str:
        """Full name of block i, "model.layers.0"."""
        return f"{self.blocks_name}.{i}"

    def linear_sizes(self) -> list[int]:
        """Number of weights in the linear layers and experts of each block, routers included;
        needs no weights in memory."""
        return [
            sum(linear.weight.numel() for linear in codable(block, "").values())
            + sum(weight_of(block, name).numel() for name in stack_names(block))
            for block in self.blocks
        ]

    def outer_names(self) -> list[str]:
        """Stored parameters and buffers outside of the blocks (tied copies left out)."""
        return [n for n in self._state_names(self.model) if self._is_outer(n)]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter of the original model by its full name, as stored or in `dtype`."""
        place = self._ties.get(name, name)
        if place not in self._keys:
            raise UnsupportedModelError(f"{self.files.folder} holds no weights for {name}.")
        return self._keys.read(place, lambda key: self.files.read(key, dtype))

    def _is_outer(self, name: str) -> bool:
        return not name.startswith(f"{self.blocks_name}.") and name not in self._ties

    @staticmethod
    def _state_names(module: nn.Module) -> list[str]:
        return list(module.state_dict(keep_vars=True))

    def _check(self) -> None:
        """Structure and weights fit, as far as that shows without running anything."""
        names = [n for n in self._state_names(self.model) if n not in self._ties]
        for i, block in enumerate(self.blocks):
            where = self.block_prefix(i)
            check_uncovered(block, where, {*codable(block, where), *stack_names(block, where)})
        self._check_shared()
        if missing := [n for n in names if n not in self._keys]:
            spare = self._keys.unused
            found = f"; the files hold {spare[0]} instead" if spare else ""
            raise UnsupportedModelError(
                f"{self.files.folder} lacks {len(missing)} of the {len(names)} tensors of "
                f"{type(self.model).__name__} (first: {missing[0]}){found}. Its files are of "
                "another model than its config.json, or incomplete: download the model again."
            )

    def _check_shared(self) -> None:
        """A weight inside of the blocks has one place."""
        prefix, places = f"{self.blocks_name}.", dict[int, str]()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = places.setdefault(id(parameter), name)
            other = self._ties.get(name, first)
            if other != name and (name.startswith(prefix) or other.startswith(prefix)):
                raise UnsupportedModelError(
                    f"{name} and {other} are one and the same weight. A matrix is coded for the "
                    "inputs of one place, so models that share weights between blocks are not "
                    "supported; use one whose blocks are all separate."
                )

    # ---- weights ---------------------------------------------------------------------------

    def _load(self, root: nn.Module, prefix: str, names: list[str]) -> None:
        """Materialise parameters and persistent buffers `names` (relative to `root`)."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = root.get_submodule(path)
            old = owner._parameters.get(leaf)
            expected = old if old is not None else owner._buffers[leaf]
            wanted = self.dtype if old is not None or expected is None else expected.dtype
            tensor = self.read(f"{prefix}{name}", wanted).to(self.device)
            if expected is None or tensor.shape != expected.shape:
                raise FormatError(
                    f"{prefix}{name} is stored as {tuple(tensor.shape)}; its config asks for "
                    f"{None if expected is None else tuple(expected.shape)}. The weights belong "
                    "to another config."
                )
            if old is not None:
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[leaf] = tensor

    def block(self, i: int) -> nn.Module:
        """Block i with its weights in memory (loaded unless they already are)."""
        block = self.blocks[i]
        stored = block.state_dict(keep_vars=True)
        if any(value.is_meta for value in stored.values()):
            # buffers are never on the meta device, but have the value of a new model until read
            buffers = dict(block.named_buffers())
            todo = [name for name, value in stored.items() if value.is_meta or name in buffers]
            self._load(block, f"{self.block_prefix(i)}.", todo)
        return block

    def release(self, i: int) -> None:
        """Free the weights of block i; the next `block(i)` loads the original ones again."""
        for module in self.blocks[i].modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=False)

    def _load_outer(self, head: bool) -> None:
        """Embedding, norms and (with `head`) what the causal LM adds to its base model."""
        base = f"{self.model.base_model_prefix}."
        whole = head or self.model.base_model is self.model
        names = [n for n in self.outer_names() if whole or n.startswith(base)]
        names = [n for n in names if not n.startswith(self._towers)]  # text does not reach them
        todo = [n for n in names if n not in self._outer_loaded]
        self._load(self.model, "", todo)
        self._outer_loaded.update(todo)
        self._share(todo)

    def _share(self, names: Sequence[str]) -> None:
        """Have what is tied to parameters `names` hold them as they are now."""
        for target, source in self._ties.items():
            if source in names and self._is_outer(source):
                path, _, leaf = target.rpartition(".")
                shared = self.model.get_parameter(source)
                self.model.get_submodule(path)._parameters[leaf] = shared

    def release_outer(self) -> None:
        """Free the parameters outside of the blocks; they are loaded again when needed."""
        names = [n for n, _ in self.model.named_parameters() if n in self._outer_loaded]
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            empty = self.model.get_parameter(name).to("meta")
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        self._outer_loaded.difference_update(names)
        self._share(names)

    # ---- running ---------------------------------------------------------------------------

    def _batches(self, n: int, t: int) -> Iterator[slice]:
        step = max(1, self.batch_tokens // t)
        return (slice(low, min(low + step, n)) for low in range(0, n, step))

    @torch.no_grad()
    def _run(self, i: int, block: nn.Module, x: Tensor) -> Tensor:
        """One batch [b, T, D] through a block, on the runner's device."""
        return self._block_inputs.through(i, block, x)

    def shards(self, n: int, t: int) -> list[list[slice]]:
        """Batches of n windows of t tokens, in at most SHARDS contiguous runs (distributed.py)."""
        batches = list(self._batches(n, t))
        count = min(SHARDS, len(batches))
        edges = [len(batches) * shard // count for shard in range(count + 1)]
        return [batches[low:high] for low, high in pairwise(edges)]

    def embed(self, ids: Tensor) -> Tensor:
        """ids [n, T] -> input of the first block, [n, T, D] in the runner's dtype."""
        n, t = ids.shape
        hidden: Tensor | None = None
        for part in self._batches(n, t):
            x = self._block_inputs.embed(ids[part]).to(ids.device)
            if hidden is None:
                hidden = torch.empty(n, t, x.shape[-1], dtype=x.dtype, device=ids.device)
            hidden[part] = x
        assert hidden is not None, "no windows"
        return hidden

    def forward_block(
        self, i: int, block: nn.Module, hidden: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Output of block i, [n, T, D] -> [n, T, D]; `out` may be `hidden` itself."""
        out = torch.empty_like(hidden) if out is None else out
        for part in self._batches(*hidden.shape[:2]):
            out[part] = self._run(i, block, hidden[part].to(self.device)).to(out)
        return out

    def input_groups(self, i: int, block: nn.Module, hidden: Tensor) -> list[InputGroup]:
        """Which linear layers of block i share an input, found on the first window.

        hidden: input of the block, [n, T, D].
        """
        x = hidden[:1].to(self.device)
        with InputRecorder(block, self.block_prefix(i), grams=False) as recorder:
            recorder.batch((1, x.shape[1]))
            self._run(i, block, x)
            recorder.end()
            return recorder.input_groups()

    def collect_statistics(
        self,
        i: int,
        block: nn.Module,
        hidden: Tensor,
        *,
        clip: float = CLIP,
        weights: TokenWeights = None,
        out: Tensor | None = None,
        partition: Partition | None = None,
    ) -> BlockStatistics:
        """Gram matrices of all input groups of block i and its output, in one pass.

        Args:
            hidden: [n, T, D], input of the block.
            clip: tokens count at most as much as `clip` times the median token of their window
                (see statistics.py); infinity switches it off.
            weights: [n, T], importance of each token, before it is clipped; or that of each input
                group, by its first module.
            out: where to write the output [n, T, D]; may be `hidden` itself.
            partition: of this process in a run of several; `hidden` has its windows alone.

        Returns:
            H [d_in, d_in] of each input group, and the output [n, T, D].

        Raises:
            UnsupportedModelError: too much of the block is in no called linear, or a linear is
                shared or routed.
            CalibrationError: activations that are not finite.
        """
        to = torch.empty_like(hidden) if out is None else out
        own = partition or Ranks().partition(self.shards(*hidden.shape[:2]))
        with InputRecorder(block, self.block_prefix(i), clip) as recorder:

            def run() -> None:
                for shard in own.shards:
                    for part in shard:
                        x = hidden[part].to(self.device)
                        recorder.batch((x.shape[0], x.shape[1]), weights_of(weights, part))
                        to[part] = self._run(i, block, x).to(to)
                        recorder.end()
                    recorder.fold(keep=own.ranks.size > 1)

            own.ranks.on_all_ranks(run)
            return recorder.result(to, own, own.count * hidden.shape[1])

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Output of the last block -> logits [n, T, vocab], with the model's own head."""
        parts = [
            self._block_inputs.logits(hidden[part].to(self.device)).to(hidden.device)
            for part in self._batches(*hidden.shape[:2])
        ]
        return torch.cat(parts)

    # ---- with the caller's values, and with gradients -----------------------------------------

    def state_names(self, i: int) -> list[str]:
        """Parameters and persistent buffers of block i, by their names in the block."""
        return self._state_names(self.blocks[i])

    def apply_block(self, i: int, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Block i with other values of all its parameters, by their names in the block.

        x [b, T, D] -> [b, T, D] on the runner's device. Gradients flow to x and to `values`; the
        weights of the block need not be loaded.
        """
        state = dict(values)

        def block(*args: Any, **named: Any) -> Any:
            return functional_call(self.blocks[i], state, args, named)

        return self._block_inputs.through(i, block, x)

    def apply_head(self, hidden: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Output of the last block [b, T, D] -> logits [b, T, vocab], with gradients.

        `values` replaces parameters outside of the blocks, by their full names.
        """
        return self._block_inputs.logits(hidden, values)
