"""Text as it comes, against decoding at the end."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models

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


def fallback_text() -> Text:
    """A vocabulary with "▁" for spaces and bytes for the rest, as SentencePiece has them."""
    words = ["▁", "▁the", "▁mill", "a", "é", "river", "!"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Text(SimpleNamespace(backend_tokenizer=made, all_special_ids=[0, 1, 2]))


def test_bytes_that_are_no_character_never_raise() -> None:
    """Such bytes come out as U+FFFD; what is valid comes out whole."""
    text, draw = fallback_text(), random.Random(0)
    for _ in range(300):
        ids = [draw.choice([draw.randrange(3, 259), draw.randrange(259, 266)]) for _ in range(30)]
        found, whole = "".join(streamed(text, ids)[0]), text.decode(ids)
        if "\ufffd" not in whole:
            assert found == whole
    smile = [3 + b for b in "😀".encode()]
    pieces, _ = streamed(text, [260, *smile, 261, 3 + 0xFF, 260])
    assert "".join(pieces) == "the😀 mill\ufffd the"
    assert pieces[:5] == ["the", "", "", "", "😀"]


def test_a_continuation_keeps_its_space() -> None:
    text = fallback_text()
    assert TextStream(text, ()).push(261) == "mill"
    assert TextStream(text, (), [260]).push(261) == " mill"


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
