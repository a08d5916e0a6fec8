"""Text and tokens: prompts and chats into tokens, tokens into text as they come.

The tokenizer of the checkpoint is used through its `tokenizers` object, which may be called from
several threads (transformers' wrapper sets options on it, and fails then). Chat templates come from
the checkpoint, never from a request, and run in transformers' sandbox.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from dropbydrop.models.chat_template import in_chat_template
from dropbydrop.system.errors import DropError

log = logging.getLogger("dropbydrop")
_CONTEXT = 6  # tokens that new ones are decoded behind
_MOST_HELD = 16  # tokens of an incomplete character; more are none


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: printable ones are themselves (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


class Text:
    """The tokenizer of a checkpoint."""

    def __init__(self, tokenizer: Any) -> None:
        """Take over a tokenizer of transformers.

        Raises:
            DropError: one without a `tokenizers` object.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DropError(
                f"{type(tokenizer).__name__} is written in Python; the server needs a tokenizer "
                "with a tokenizer.json, which transformers can convert it to."
            )
        backend.no_truncation()
        backend.no_padding()
        self.tokenizer, self.backend = tokenizer, backend
        self._byte_level = type(backend.decoder).__name__ == "ByteLevel"
        self.special = frozenset(tokenizer.all_special_ids)
        self.size = backend.get_vocab_size()
        self.longest = max(map(len, backend.get_vocab()), default=1)  # characters of a token
        self.template = getattr(tokenizer, "chat_template", None)
        self.response_template = _usable(getattr(tokenizer, "response_template", None))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special` adds what the tokenizer puts around a text.

        Other threads go on meanwhile, which they do only for batches.
        """
        return list(self.backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        if not ids:  # some decoders fail on a text without characters
            return ""
        return str(self.backend.decode_batch([list(ids)], skip_special_tokens=True)[0])

    def piece(self, token: int) -> str:
        """One token as text, special ones too; incomplete characters become U+FFFD."""
        return str(self.backend.decode([token], skip_special_tokens=False))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; incomplete characters too."""
        text = self.backend.id_to_token(token) or ""
        if self._byte_level and token not in self.special and all(c in _BYTES for c in text):
            return bytes(_BYTES[c] for c in text)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes([int(found[1], 16)])
        return self.piece(token).encode()

    def name(self, token: int) -> str:
        """A token as a text of its own: incomplete characters as "bytes:\\xe2\\x80"."""
        piece = self.piece(token)
        if "\ufffd" not in piece:
            return piece
        return "bytes:" + "".join(f"\\x{b:02x}" for b in self.bytes_of(token))

    def chat(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        """The prompt for an answer to a chat; raises what `in_chat_template` raises."""
        return in_chat_template(self.tokenizer, messages, tools)


def _usable(template: Any) -> Any:
    """A response template, or None for one that transformers cannot read."""
    if template is not None:
        from transformers.utils.chat_parsing import ResponseParser

        try:
            ResponseParser(template, prefix="")
        except (ValueError, TypeError, KeyError) as error:
            log.warning(f"the tokenizer's response template is ignored: {error}")
            return None
    return template


class TextStream:
    """New tokens in, new text out; nothing at or after a stop text comes out.

    What may be the beginning of a stop text is held back until it is clear, and so are the bytes of
    an incomplete character. Tokens are decoded behind the last few ones, so that spaces come out
    right, and never all again. (tokenizers' own DecodeStream raises where bytes form no character,
    which models at few bits do write.)
    """

    def __init__(
        self, text: Text, stop: Sequence[str], before: Sequence[int] = (), special: bool = False
    ) -> None:
        """Begin.

        Args:
            before: tokens that the new ones continue; none for a text of its own.
            special: whether special tokens are text, for templates that look for them.
        """
        self._text, self._stop, self._special = text, tuple(stop), special
        self._ids = list(before[-_CONTEXT:])  # the last ones that are out, and those held back
        self._out = len(self._ids)  # how many of them are out
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        piece = self._new()
        if piece.endswith("\ufffd") and len(self._ids) - self._out < _MOST_HELD:
            return ""
        self._taken()
        return self._release(piece)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        rest = self._release(self._new())
        self._taken()
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _new(self) -> str:
        """The text of the tokens that are not out yet."""
        known = self._decode(self._ids[: self._out])
        return self._decode(self._ids)[len(known) :]

    def _taken(self) -> None:
        self._ids = self._ids[-_CONTEXT:]
        self._out = len(self._ids)

    def _decode(self, ids: list[int]) -> str:
        decoded = self._text.backend.decode(ids, skip_special_tokens=not self._special)
        return str(decoded)

    def _release(self, piece: str) -> str:
        if not self._stop:
            return piece
        known = self._held + piece
        found = [at for s in self._stop if (at := known.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return known[: min(found)]
        keep = max(_overlap(known, s) for s in self._stop)
        self._held = known[len(known) - keep :]
        return known[: len(known) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
