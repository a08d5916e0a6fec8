"""Calibration: the token windows that Gram matrices are measured on.

`load_windows(spec, ...)`, where `spec` is a file (text_files.py), a hub dataset `hub:NAME[:SPLIT]`
(hub.py), or `self`, text that the model writes itself (self_generated.py), which needs no data; how
it writes can be changed from Python (`Writing`).

From a file, windows of `seq_len` tokens are drawn at random, without overlap, and kept in the order
of the text: a seed chooses a spread over the whole file rather than its beginning. Very large texts
are read up to max(16 Mi, 16 per token asked for) characters.

Tokenizers that put a BOS before a text get one at the start of every window: the first token takes
the massive activations in use, so it must do so in calibration.

What was used is described in a dictionary that goes into the checkpoint: file name and hash of the
text, never its path or content.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.models.sources import Source
from dropbydrop.system.errors import CalibrationError
from dropbydrop.system.paths import given
from dropbydrop.system.settings import check_windows

from .hub import is_hub_text, read_hub_text
from .self_generated import Writing, write_windows
from .text_files import cut, leading_bos, read_text, sizes, text_hash, tokenize, too_short

SELF = "self"
_MIN_CHARS = 16 << 20
_CHARS_PER_TOKEN = 16


@dataclass(frozen=True)
class Calibration:
    """Windows and where they come from.

    Attributes:
        ids: int64 [n, seq_len].
        description: JSON-able; "kind" is "text" or "self".
    """

    ids: Tensor
    description: dict[str, Any]


def load_windows(
    spec: str | Path,
    tokenizer: Any,
    n_windows: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    *,
    source: Source | None = None,
    writing: Writing | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Calibration:
    """Windows from a file or hub dataset, or written by the model when `spec` is "self".

    Args:
        spec: path of a text, `.raw` or `.jsonl` file; "hub:NAME[[:CONFIG]:SPLIT]"; or "self".
        source: the model; only needed for "self".
        writing: how the model writes, by default as `Writing()`; only used for "self".
        device: where the model writes; only used for "self".
        progress: whether the model's writing is shown.

    Raises:
        CalibrationError: missing, unreadable or too short a text; the last says how many tokens
            were found and needed.
    """
    check_windows(n_windows, seq_len)
    if str(spec) == SELF:
        if source is None:
            raise ValueError("calibration 'self' needs the model's source")
        writing = writing or Writing()
        ids = write_windows(
            source.folder, tokenizer, n_windows, seq_len, seed, writing, progress, device
        )
        extra = {"kind": SELF, "seed": seed, **asdict(writing)}
        return Calibration(ids, extra | sizes(ids))
    most = max(_MIN_CHARS, _CHARS_PER_TOKEN * n_windows * seq_len)
    if is_hub_text(spec):
        name, text = str(spec), read_hub_text(str(spec), most)
    else:
        file = given(spec)
        name, text = file.name, read_text(file, most)
    ids, bos = tokenize(text, tokenizer), leading_bos(tokenizer)
    if bos is not None:
        ids = ids[1:]  # every window gets its own below
    body = seq_len - (bos is not None)
    windows = cut(ids, body)
    if windows.shape[0] < n_windows:
        raise CalibrationError(too_short(spec, ids.numel(), n_windows, seq_len))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows.shape[0], generator=generator)[:n_windows].sort().values
    picked = windows[chosen]
    if bos is not None:
        picked = torch.cat([torch.full((n_windows, 1), bos), picked], dim=1)
    description = {"kind": "text", "text": name, "sha256": text_hash(text), "seed": seed}
    return Calibration(picked, description | sizes(picked) | {"bos": bos is not None})


def file_of(spec: str | Path) -> Path | None:
    """The file that a calibration text is read from; None for the hub and "self"."""
    path = given(spec)
    return path if str(spec) != SELF and path.is_file() else None
