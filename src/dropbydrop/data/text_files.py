"""Texts to token windows, for calibration and for evaluation alike.

Three kinds of file, by suffix:
- `.raw` (WikiText): the usual recipe of quantization papers, rows joined by a blank line, where row
  i is line i with its newline, or "" for a blank line. Published perplexities are on this text.
- `.jsonl`: one object a line with a string "text"; documents are joined by a blank line.
- anything else: the file as it is.

The whole text is tokenized once, with whatever special tokens the tokenizer adds by itself (a
leading BOS for some families, nothing for others), and cut into windows that do not overlap.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import CalibrationError
from dropbydrop.system.paths import given
from dropbydrop.system.settings import check_windows


def raw_rows(text: str) -> str:
    """WikiText's raw file -> the text that perplexities are quoted on."""
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def read_text(file: Path, max_chars: int | None = None) -> str:
    """The text of a file, by the recipe of its suffix; at most `max_chars` characters of it.

    Raises:
        CalibrationError: missing, empty, not UTF-8, or `.jsonl` lines without a "text".
    """
    try:
        with open(file, encoding="utf-8") as handle:
            if file.suffix == ".jsonl":
                text = join_documents(_documents(file, handle), max_chars)
            else:
                # Python makes room for as many as are asked for
                text = handle.read(-1 if max_chars is None or max_chars >> 30 else max_chars)
    except OSError as error:
        raise CalibrationError(f"cannot read the text {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file} is not UTF-8 text (byte {error.start}); convert it, or give another file."
        ) from error
    if file.suffix == ".raw":
        text = raw_rows(text)
    refuse_surrogates(text, str(file))
    if not text.strip():
        raise CalibrationError(f"{file} holds no text.")
    return text


def refuse_surrogates(text: str, what: str) -> None:
    """Raises CalibrationError for half a character (a lone surrogate, as JSON can write it)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{what} holds half a character ({text[error.start]!a} at {error.start:,}), which no "
            "tokenizer reads; remove it."
        ) from error


def check_tokens(ids: Tensor, known: int) -> None:
    """Refuse tokens that a model of `known` tokens has no embedding for.

    Raises:
        CalibrationError: the largest one and their number.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise CalibrationError(
            f"the text has a token {int(ids.max())}, but the model embeds {known:,}: its tokenizer "
            "was extended, or belongs to another model. Use text without added tokens, or the "
            "model's own tokenizer."
        )


def _documents(file: Path, lines: Iterable[str]) -> Iterator[str]:
    """The texts of a `.jsonl` file, line by line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(
                f'{file}, line {number}: expected a JSON object with a "text" ({error!r}).'
            ) from error
        if not isinstance(document, str):
            raise CalibrationError(f'{file}, line {number}: "text" is not a string.')
        yield document


def join_documents(documents: Iterable[str], max_chars: int | None) -> str:
    """The first `max_chars` characters of documents joined by a blank line; no more are read."""
    parts, size = [], 0
    for document in documents:
        parts.append(document)
        size += len(document) + 2
        if max_chars is not None and size >= max_chars:
            break
    return "\n\n".join(parts)[:max_chars]


def text_hash(text: str) -> str:
    """SHA-256 of the text as it is tokenized."""
    return hashlib.sha256(text.encode()).hexdigest()


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """int64 [tokens], with the special tokens that the tokenizer adds by default."""
    with quiet_transformers():  # no warning that the text exceeds the context
        ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def leading_bos(tokenizer: Any) -> int | None:
    """The BOS that the tokenizer puts before a text by itself, or None."""
    ids = tokenize("a", tokenizer)
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and ids.numel() > 1 and int(ids[0]) == bos else None


def cut(ids: Tensor, seq_len: int) -> Tensor:
    """[tokens] -> [tokens // seq_len, seq_len]; the rest is dropped."""
    n = ids.numel() // seq_len
    return ids[: n * seq_len].view(n, seq_len)


def text_windows(
    file: Path | str, tokenizer: Any, seq_len: int, n: int | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The first `n` windows of a text (all without `n`), and a description of them.

    Returns:
        ids int64 [n, seq_len]; {"text", "sha256", "windows", "seq_len", "tokens"}.

    Raises:
        CalibrationError: unreadable, or shorter than one window (or than `n`).
    """
    check_windows(1 if n is None else n, seq_len)
    file = given(file)
    text = read_text(file)
    ids = tokenize(text, tokenizer)
    windows = cut(ids, seq_len)
    wanted = 1 if n is None else n
    if windows.shape[0] < wanted:
        raise CalibrationError(too_short(file, ids.numel(), wanted, seq_len))
    windows = windows[:n]
    return windows, {"text": file.name, "sha256": text_hash(text), **sizes(windows)}


def sizes(windows: Tensor) -> dict[str, int]:
    """What a description says of the windows [n, seq_len] themselves."""
    n, seq_len = windows.shape
    return {"windows": n, "seq_len": seq_len, "tokens": n * seq_len}


def too_short(text: Path | str, found: int, windows: int, seq_len: int) -> str:
    """The message for a text that does not fill the windows asked for."""
    return (
        f"{text} has {found:,} tokens; {windows} windows of {seq_len:,} need "
        f"{windows * seq_len:,}. Give a longer text, or ask for at most {found // seq_len} windows "
        f"of {seq_len:,} (or for shorter ones)."
    )
