"""Text as it comes, against decoding at the end."""

from __future__ import annotations

import random

import pytest

from dropbydrop.serve.text import Text, TextStream
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def text() -> Text:
    return Text(tiny_tokenizer(bos=True, chat=True))


def streamed(text: Text, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream, pieces = TextStream(text, stop), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    return pieces, stream.stopped


def test_pieces_add_up_to_the_text(text: Text) -> None:
    for words in ("the old mill", "é 😀 – naïve", "汉字漢字", "a\n\n  b\t"):
        pieces, _ = streamed(text, text.encode(words, special=False))
        assert "".join(pieces) == words
        assert not any("�" in piece for piece in pieces)


def test_any_tokens_give_what_decoding_gives(text: Text) -> None:
    draw = random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(text.size) for _ in range(30)]
        assert "".join(streamed(text, ids)[0]) == text.decode(ids)


def test_stop_texts_are_never_seen(text: Text) -> None:
    words = "the river runs past the old mill"
    for stop in ("past", "r runs p", "mill", "t", "zzz"):
        pieces, stopped = streamed(text, text.encode(words, special=False), (stop,))
        assert "".join(pieces) == words.split(stop)[0]
        assert stopped == (stop in words)


def test_the_earliest_of_several_stop_texts(text: Text) -> None:
    pieces, _ = streamed(text, text.encode("one two three", special=False), ("three", "tw", "two"))
    assert "".join(pieces) == "one "


def test_what_may_begin_a_stop_text_is_held_back(text: Text) -> None:
    stream = TextStream(text, ("xyz",))
    shown = "".join(stream.push(token) for token in text.encode("ab xy", special=False))
    assert shown == "ab "
    assert stream.end() == "xy"


def test_bytes_and_names_of_tokens(text: Text) -> None:
    ids = text.encode("é😀", special=False)
    assert b"".join(map(text.bytes_of, ids)) == "é😀".encode()
    assert text.bytes_of(2) == b"</s>"
    half = next(i for i in range(text.size) if text.bytes_of(i) == b"\xf0")
    assert text.name(half) == r"bytes:\xf0"
    assert len({text.name(i) for i in range(text.size)}) == text.size


def test_special_tokens_only_where_asked(text: Text) -> None:
    assert text.encode("the")[0] == 1
    assert text.encode("the", special=False)[0] != 1
