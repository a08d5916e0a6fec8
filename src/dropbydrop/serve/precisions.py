"""The precisions of one served checkpoint: views on one store, and what a token costs at each.

Every level has its view from the beginning. The view of an average (2.5) is made when a request
asks for it, and the last few are kept: a view is a tree of modules without tensors of its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.evaluation.bench import read_bytes
from dropbydrop.planning.memory import kv_cache
from dropbydrop.planning.precision import Precision
from dropbydrop.planning.solver import levels_here
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.load import load_views
from dropbydrop.runtime.views import view
from dropbydrop.system.errors import PrecisionError

from .caches import new_cache
from .shed import Costs, Meter

_MOST_AVERAGES = 8
_WARM = 6  # steps at each level before the first request
_ROWS = 4  # requests of a pass that is measured then


class Precisions:
    """Views of one checkpoint, by bits. Only `costs` and `bytes_of` are for other threads."""

    def __init__(self, folder: Path | str, levels: Sequence[int] | None) -> None:
        """Load a checkpoint.

        Args:
            levels: the levels to serve; by default all whose planes are in the folder.

        Raises:
            DropError: as `load`.
        """
        checkpoint = Checkpoint.open(folder)
        chosen = sorted(set(levels or levels_here(checkpoint)))
        if not chosen:
            raise PrecisionError(
                f"{folder}: there is no level to serve; give --bits, such as 2,3,4."
            )
        views = load_views(checkpoint, {str(p): Precision(p) for p in chosen})
        self.checkpoint, self.levels = checkpoint, tuple(chosen)
        self._views: dict[float, Any] = {p: views[str(p)][1] for p in chosen}
        self._averages: OrderedDict[float, Any] = OrderedDict()
        self._bytes: dict[float, int] = {p: read_bytes(m) for p, m in self._views.items()}
        self._meter = Meter()
        self.base = self._views[chosen[-1]]
        self.cache_bytes = _cache_bytes(self.base)

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
        the highest level, of several requests together. Tries whether levels can share a pass.

        Levels take turns and the fastest step of each counts, so that other work on the machine,
        which comes and goes, does not change their order.
        """
        ids, size = torch.zeros(1, 1, dtype=torch.long), 2 + 3 * _WARM
        caches = {
            bits: new_cache(model.config, fused_decode.native(model), 1, size)
            for bits, model in self._views.items()
        }
        times: dict[float, list[float]] = {bits: [] for bits in caches}
        for _ in range(1 + _WARM):
            for bits, model in self._views.items():
                start = time.perf_counter()
                model(input_ids=ids, past_key_values=caches[bits], use_cache=True)
                times[bits].append(time.perf_counter() - start)
        seconds = {bits: min(found[1:]) for bits, found in times.items()}
        self._meter = Meter(seconds)
        model = self._views[self.highest]
        rows = [new_cache(model.config, fused_decode.native(model), 1, size) for _ in range(_ROWS)]
        for cache in rows:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        shared = []
        for _ in range(_WARM):
            start = time.perf_counter()
            if fused_decode.decode_together([model] * _ROWS, [0] * _ROWS, rows) is None:
                return
            shared.append(time.perf_counter() - start)
        row = (min(shared[1:]) / seconds[self.highest] - 1) / (_ROWS - 1)
        ends = [self._views[p] for p in (self.levels[0], self.highest)]
        mixed = fused_decode.decode_together(ends, [0, 0], rows[:2]) is not None
        self._meter = Meter(seconds, min(max(row, 0.0), 1.0), mixed)


def _cache_bytes(model: Any) -> int:
    """Bytes of the keys and values of a token. Configs answer to the common names by attributes."""
    config, settings = model.config.get_text_config(), {}
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "hidden_size"):  # fmt: skip
        if getattr(config, name, None) is not None:
            settings[name] = getattr(config, name)
    return max(kv_cache(settings, 1, model.dtype.itemsize), 1)
