"""Gram matrices of a model and a calibration, measured once and kept in the user's cache.

    grams_for(source, options)   cached statistics, collected when they are not there
    find_grams(folder)           what is cached for a model, whatever its calibration; or None

A cache folder is named by the digest of the model's files, tokenizer included, and a hash of
everything else that decides the statistics: text (its content's hash, or "self"), windows, their
length, seed, held-out text. Naming it takes no tokenizing, so a second run starts at once.

Held-out tokens come from a text of their own, or else from the same source: windows of the same
file that calibration does not use, or text that the model writes with the next seed. Calibration
windows are those that `dropbydrop quantize` draws with the same options.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dropbydrop.data.calibration import SELF, load_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import Source
from dropbydrop.models.statistics import CLIP
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.digest import file_digest, model_digest
from dropbydrop.system.errors import CalibrationError, DropError
from dropbydrop.system.file_errors import file_errors
from dropbydrop.system.locks import lock
from dropbydrop.system.paths import given

from .data import GramFolder, Progress, collect


@dataclass(frozen=True)
class GramOptions:
    """Which tokens the Gram matrices are measured on.

    Attributes:
        calibration, held_out: "self" or the path of a text; held_out None: see the module's note.
        windows, seq_len, seed: as for `dropbydrop quantize`; a quarter as many windows are held
            out, at least one.
    """

    calibration: str = SELF
    held_out: str | None = None
    windows: int = 64
    seq_len: int = 1024
    seed: int = 0

    @property
    def held_windows(self) -> int:
        return max(1, self.windows // 4)


def grams_for(
    source: Source,
    options: GramOptions,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> GramFolder:
    """Statistics of the unquantized model in `source`, from the cache or measured now.

    Args:
        cache: folder of caches; default `grams` in the user's cache folder.

    Raises:
        CalibrationError: a text that is missing or too short.
        DropError: another process measures the same.
        FormatError, UnsupportedModelError: as `data.collect`.
    """
    name = f"{model_digest(source.folder)[:16]}-{_key(options)[:16]}"
    folder = (cache or _default()) / name
    if not len(GramFolder(folder)):
        with _alone(folder):
            ids, held = _tokens(source, options)
            collect(BlockRunner.open(source.folder), ids, folder, held, progress=progress)
    return GramFolder(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process collects into `folder` meanwhile.

    Raises:
        DropError: one does.
    """
    guard = folder.with_name(f".{folder.name}.lock")
    busy = f"another process is measuring the inputs of this model in {folder}; wait for it."
    with file_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock(guard, DropError(busy), folder=False)
    try:
        yield
    finally:
        guard.unlink(missing_ok=True)
        os.close(held)


def find_grams(folder: Path, cache: Path | None = None) -> GramFolder | None:
    """The newest cached statistics of the model in `folder`, or None."""
    candidates = (cache or _default()).glob(f"{model_digest(folder)[:16]}-*")
    filled = [path for path in candidates if len(GramFolder(path))]
    newest = max(filled, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else GramFolder(newest)


def _default() -> Path:
    return cache_dir() / "grams"


def _key(options: GramOptions) -> str:
    described: dict[str, Any] = asdict(options) | {"clip": CLIP, "version": 3}
    for name in ("calibration", "held_out"):
        if described[name] not in (None, SELF):
            described[name] = _file_hash(given(described[name]))
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        return f"{path.suffix} {file_digest(path)}"
    except OSError as error:
        raise CalibrationError(f"cannot read the text {path}: {error.strerror}.") from error


def _tokens(source: Source, options: GramOptions) -> tuple[Tensor, Tensor]:
    """Calibration ids [n, T] and held-out ids [m, T]."""
    tokenizer = source.tokenizer()
    config = json.loads((source.folder / "config.json").read_text())
    seq_len = min(options.seq_len, context_length(config) or options.seq_len)

    def draw(spec: str, windows: int, seed: int) -> Tensor:
        return load_windows(spec, tokenizer, windows, seq_len, seed, source=source).ids

    n, m = options.windows, options.held_windows
    if options.held_out is not None:
        held = draw(options.held_out, m, options.seed)
        return draw(options.calibration, n, options.seed), held
    if options.calibration == SELF:
        return draw(SELF, n, options.seed), draw(SELF, m, options.seed + 1)
    ids, more = (draw(options.calibration, k, options.seed) for k in (n, n + m))
    # One seed draws one order of the text's windows, so the n are among the n + m.
    used = (more[:, None] == ids[None]).all(-1).any(1)
    held = more[~used][:m]
    if not len(held):  # a text that repeats itself
        raise CalibrationError(
            f"{options.calibration} has no windows that differ from those of the calibration; "
            "name another text with --held-out."
        )
    return ids, held
