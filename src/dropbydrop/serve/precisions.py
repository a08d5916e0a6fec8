"""The precisions of one served checkpoint: views on one store, and what a token costs at each.

Every level has its view from the beginning. The view of an average (2.5) is made when a request
asks for it, and the last few are kept: a view is a tree of modules without tensors of its own.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.evaluation.bench import read_bytes
from dropbydrop.models.cached import wants_positions
from dropbydrop.planning.memory import kv_cache
from dropbydrop.planning.precision import Precision
from dropbydrop.planning.solver import levels_here
from dropbydrop.runtime import fused_decode, torch_batch
from dropbydrop.runtime.load import load_views
from dropbydrop.runtime.views import view
from dropbydrop.system.errors import PrecisionError

from .caches import new_cache
from .shed import Costs, Meter

log = logging.getLogger("dropbydrop")
_MOST_AVERAGES = 24  # more than requests run at once, or their tokens would make views again
_WARM = 6  # steps at each level before the first request
_ROWS = 4  # requests of a pass that is measured then


class Precisions:
    """Views of one checkpoint, by bits. Only `costs` and `bytes_of` are for other threads."""

    def __init__(
        self, folder: Path | str, levels: Sequence[int] | None, device: str = "cpu"
    ) -> None:
        """Load a checkpoint.

        Args:
            levels: the levels to serve; by default all whose planes are in the folder.
            device: where everything is computed.

        Raises:
            UnsupportedModelError: it does not continue a text from a cache.
            DropError: as `load`.
        """
        checkpoint = Checkpoint.open(folder)
        chosen = sorted(set(levels or levels_here(checkpoint)))
        if not chosen:
            raise PrecisionError(
                f"{folder}: there is no level to serve; give --bits, such as 2,3,4."
            )
        views = load_views(checkpoint, {str(p): Precision(p) for p in chosen}, device=device)
        self.checkpoint, self.levels = checkpoint, tuple(chosen)
        self._views: dict[float, Any] = {p: views[str(p)][1] for p in chosen}
        self._averages: OrderedDict[float, Any] = OrderedDict()
        self._bytes: dict[float, int] = {p: read_bytes(m) for p, m in self._views.items()}
        self._meter = Meter()
        self.base = self._views[chosen[-1]]
        self.cache_bytes = _cache_bytes(self.base)
        self.told = False  # whether models are told positions
        if not fused_decode.native(self.base):
            self.told = wants_positions(self.base, partial(_new_cache, self.base))
        self.batched = False  # whether requests share a pass through torch; `warm_up` tries it
        self._turns: tuple[int, ...] = ()

    @property
    def highest(self) -> int:
        return self.levels[-1]

    def model(self, bits: float) -> Any:
        """The view at a level, or at an average.

        Raises:
            DropError: an average that cannot be planned.
        """
        if bits in self._views:
            return self._views[bits]
        if bits not in self._averages:
            self._averages[bits] = made = view(self.base, avg_bits=bits)
            self._bytes[bits] = read_bytes(made)
            if len(self._averages) > _MOST_AVERAGES:
                self._averages.popitem(last=False)
        self._averages.move_to_end(bits)
        return self._averages[bits]

    def pass_of(self, bits: float, tokens: int) -> tuple[float, int]:
        """A key that requests which may share a pass have in common.

        Args:
            tokens: of the request, with the next one.
        """
        if self._meter.costs().mixed:
            return 0, 0
        return bits, sum(tokens > turn for turn in self._turns)

    def bytes_of(self, bits: float) -> int:
        """Bytes that a token reads; 0 for an average that was not used yet."""
        return self._bytes.get(bits, 0)

    def costs(self) -> Costs:
        """What was measured; averages are not listed."""
        return self._meter.costs()

    def measured(self, levels: Sequence[float], seconds: float) -> None:
        """Note the duration of a pass, with the precision of each request in it."""
        self._meter.note(levels, seconds)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run some steps at each level: prepares its matrices, and measures a step, alone and, at
        the highest level, of several requests together. Tries whether requests can share a pass,
        and at different levels.

        Levels take turns and the fastest step of each counts, so that other work on the machine,
        which comes and goes, does not change their order.
        """
        if not fused_decode.native(self.base):
            why = torch_batch.refusal(self.base)
            self.batched, self._turns = why is None, torch_batch.turns(self.base)
            if why is not None:
                log.info(f"requests take turns: {why}")
        steps = {bits: self._stepper([model]) for bits, model in self._views.items()}
        times: dict[float, list[float]] = {bits: [] for bits in steps}
        for _ in range(1 + _WARM):
            for bits, step in steps.items():
                times[bits].append(_seconds(step))
        seconds = {bits: min(found[1:]) for bits, found in times.items()}
        self._meter = Meter(seconds)
        together = self._stepper([self._views[self.highest]] * _ROWS)
        if together() is None:
            return
        shared = min(_seconds(together) for _ in range(_WARM))
        row = (shared / seconds[self.highest] - 1) / (_ROWS - 1)
        ends = [self._views[p] for p in (self.levels[0], self.highest)]
        mixed = not self.batched and self._stepper(ends)() is not None
        self._meter = Meter(seconds, min(max(row, 0.0), 1.0), mixed)

    def _stepper(self, models: Sequence[Any]) -> Callable[[], Any]:
        """A function that computes one more token of a request at each of these views, together;
        None comes of it where they cannot share a pass."""
        first, size = models[0], 4 + 2 * _WARM
        ids = torch.zeros(1, 1, dtype=torch.long, device=first.device)
        caches = [new_cache(m.config, fused_decode.native(m), 1, size) for m in models]
        for model, cache in zip(models, caches, strict=True):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        zeros = [0] * len(models)
        if self.batched:
            batch, rows = torch_batch.TorchBatch(), [torch_batch.Row(c, 1) for c in caches]
            return lambda: batch.step(first, rows, zeros)
        if len(models) > 1:
            return lambda: fused_decode.decode_together(models, zeros, caches)
        return lambda: first(input_ids=ids, past_key_values=caches[0], use_cache=True).logits.cpu()


def _new_cache(model: Any, tokens: int) -> Any:
    return new_cache(model.config, False, tokens, tokens)


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cache_bytes(model: Any) -> int:
    """Bytes of the keys and values of a token. Configs answer to the common names by attributes."""
    config, settings = model.config.get_text_config(), {}
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "hidden_size"):  # fmt: skip
        if getattr(config, name, None) is not None:
            settings[name] = getattr(config, name)
    return max(kv_cache(settings, 1, model.dtype.itemsize), 1)
