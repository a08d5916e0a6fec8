"""Texts to windows, and text that the model writes itself."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import family_models
import tiny
from dropbydrop.data import kv_slots
from dropbydrop.data import self_generated as selfgen
from dropbydrop.data.calibration import load_windows
from dropbydrop.data.self_generated import Writing
from dropbydrop.data.text_files import leading_bos, raw_rows, read_text, text_windows
from dropbydrop.models.sources import Source
from dropbydrop.system.errors import CalibrationError
from tiny import FAMILIES, save_tiny

WORDS = "the river runs past the old mill and three ships left the harbour in the morning\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i} {WORDS}" for i in range(60)))
    return file


def tokens_of(text: str) -> list[int]:
    return tiny.tiny_tokenizer()(text).input_ids


def test_windows_lie_in_the_text_without_overlap(text: Path) -> None:
    found = load_windows(text, tiny.tiny_tokenizer(), 6, 32, seed=1)
    assert found.ids.shape == (6, 32)
    assert found.ids.dtype == torch.int64
    ids = tokens_of(text.read_text())
    starts = []
    for row in found.ids.tolist():
        starts += [i for i in range(0, len(ids) - 31, 32) if ids[i : i + 32] == row]
    assert starts == sorted(set(starts))
    assert len(starts) == 6
    assert starts[-1] > 8 * 32, "spread over the text, not its first windows"
    other = load_windows(text, tiny.tiny_tokenizer(), 6, 32, seed=2)
    again = load_windows(text, tiny.tiny_tokenizer(), 6, 32, seed=1)
    assert torch.equal(found.ids, again.ids)
    assert not torch.equal(found.ids, other.ids)


def test_description_names_the_text_not_its_place(text: Path) -> None:
    found = load_windows(text, tiny.tiny_tokenizer(), 2, 16, seed=5).description
    assert found == {
        "kind": "text",
        "text": "text.txt",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "seed": 5,
        "windows": 2,
        "seq_len": 16,
        "tokens": 32,
        "bos": False,
    }
    assert json.loads(json.dumps(found)) == found


def test_every_window_begins_with_a_default_bos(text: Path) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    assert leading_bos(tokenizer) == 1
    assert leading_bos(tiny.tiny_tokenizer()) is None
    n = (len(tokens_of(text.read_text())) - 1) // 15  # all there are, so the first one too
    found = load_windows(text, tokenizer, n, 16, seed=0)
    assert found.ids.shape == (n, 16)
    assert bool((found.ids[:, 0] == 1).all())
    assert int((found.ids == 1).sum()) == n
    assert found.description["bos"] is True


def test_raw_recipe() -> None:
    # rows: " \n" (blank), " = Title = \n", " \n", " text \n"
    assert raw_rows(" \n = Title = \n \n text \n") == "\n\n = Title = \n\n\n\n\n text \n"


def test_raw_suffix_applies_the_recipe(tmp_path: Path) -> None:
    for name in ("a.raw", "a.txt"):
        (tmp_path / name).write_text(" \n one \n two \n")
    assert read_text(tmp_path / "a.txt") == " \n one \n two \n"
    assert read_text(tmp_path / "a.raw") == "\n\n one \n\n\n two \n"


@pytest.mark.skipif("DROPBYDROP_DATA" not in os.environ, reason="DROPBYDROP_DATA is not set")
def test_wikitext_is_the_published_text() -> None:
    folder = Path(os.environ["DROPBYDROP_DATA"]) / "wikitext2_raw"
    text = read_text(folder / "wiki.test.raw").encode()
    assert len(text) == 1296370
    published = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
    assert hashlib.sha256(text).hexdigest() == published


def test_jsonl_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert read_text(file) == "one\n\ntwo"
    assert read_text(file, max_chars=2) == "on"
    assert read_text(file, max_chars=5) == "one"
    for bad, message in (
        ('{"text": "a"}\n{"content": "b"}', "line 2"),
        ('{"text": 3}', "not a string"),
        ("{", "line 1"),
        ('["text"]', "line 1"),
        ("[" * 200_000, "line 1"),
    ):
        file.write_text(bad)
        with pytest.raises(CalibrationError, match=message):
            read_text(file)


def test_bad_texts(tmp_path: Path, text: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    count = len(tokens_of(text.read_text()))
    with pytest.raises(CalibrationError, match=rf"{count:,} tokens; 900 windows of 16 need 14,400"):
        load_windows(text, tokenizer, 900, 16)
    with pytest.raises(CalibrationError, match="need 14,400"):
        text_windows(text, tokenizer, 16, 900)
    with pytest.raises(CalibrationError, match="give 1 or more"):
        load_windows(text, tokenizer, 0, 16)
    with pytest.raises(CalibrationError, match="No such file"):
        load_windows(tmp_path / "absent.txt", tokenizer)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="holds no text"):
        load_windows(tmp_path / "empty.txt", tokenizer)
    (tmp_path / "binary.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(CalibrationError, match="UTF-8"):
        load_windows(tmp_path / "binary.txt", tokenizer)


def test_evaluation_windows_are_the_first_ones(text: Path) -> None:
    ids, description = text_windows(text, tiny.tiny_tokenizer(), 16, 3)
    assert ids.flatten().tolist() == tokens_of(text.read_text())[:48]
    assert description["windows"] == 3
    everything, _ = text_windows(text, tiny.tiny_tokenizer(), 16)
    assert everything.shape[0] == len(tokens_of(text.read_text())) // 16


# ---- self ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tiny.save_tiny(tmp_path_factory.mktemp("m"), "mistral", chat=True)
    return Source("tiny", folder)


def test_self_is_seeded_and_described(source: Source) -> None:
    tokenizer = source.tokenizer()
    writing = Writing(temperature=0.7)
    one = load_windows("self", tokenizer, 4, 24, seed=1, source=source, writing=writing)
    two = load_windows("self", tokenizer, 4, 24, seed=1, source=source, writing=writing)
    other = load_windows("self", tokenizer, 4, 24, seed=2, source=source, writing=writing)
    assert one.ids.shape == (4, 24)
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, other.ids)
    assert one.description["kind"] == "self"
    assert one.description["temperature"] == 0.7
    conversation = tokenizer.convert_tokens_to_ids("<user>")
    assert one.ids[1, 0] == one.ids[3, 0] == conversation
    assert conversation not in one.ids[0::2, 0]


def test_self_samples_follow_the_model(source: Source) -> None:
    """At a temperature near 0 every sampled token is the model's likeliest one, cache and all."""
    cold = Writing(temperature=1e-4)
    ids = load_windows("self", source.tokenizer(), 2, 20, source=source, writing=cold).ids
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids[:1], use_cache=False).logits[0, :-1]
    end = source.tokenizer().eos_token_id
    ended = (ids[0] == end).nonzero()
    until = int(ended[0]) if ended.numel() else 19
    assert until > 3
    taken = logits.gather(1, ids[0, 1:, None])[:, 0]
    behind = (logits.max(-1).values - taken) / logits.std(-1)
    assert behind[:until].max() < 0.1, "the text may be written in bfloat16"
    assert (logits.median(-1).values < taken)[:until].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_attention_is_attention(tmp_path: Path, family: str) -> None:
    """Prompt, then single tokens with a cache, past the window of those that have one."""
    folder = save_tiny(tmp_path / family, family)
    usual = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    folded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert selfgen.fold_attention(folded) == (family != "gemma2"), "soft caps are not for sdpa"
    ids = torch.randint(5, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    caches: list[Any] = [None, None]
    for piece in (ids[:, :4], *ids[:, 4:].split(1, 1)):
        found = []
        for i, model in enumerate((usual, folded)):
            with torch.no_grad():
                out = model(piece, past_key_values=caches[i], use_cache=True)
            caches[i] = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_long_windows_are_filled_by_several_texts(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selfgen, "LEAST_BYTES", 1)  # one text a batch
    monkeypatch.setattr(selfgen, "TOTAL_BYTES", 1)
    short = Writing(text_tokens=8)
    ids = load_windows("self", source.tokenizer(), 2, 20, source=source, writing=short).ids
    assert ids.shape == (2, 20)
    user = source.tokenizer().convert_tokens_to_ids("<user>")
    assert ids[0, 7] == user, "the second text of a window is a conversation"


def test_draw_has_the_right_frequencies() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).repeat(40000, 1)
    drawn = selfgen.draw(logits, 0.5, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=4) / drawn.numel()
    expected = torch.softmax(logits[0] / 0.5, -1)
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.01)


def test_writers_follow_the_template() -> None:
    start = iter([[50], [51]])
    bare = selfgen._Writer(None, lambda: next(start), {2})
    assert [bare.next(i) for i in (9, 7, 2, 9, 8)] == [50, 7, 2, 51, 8]
    chat = selfgen._Writer(([3], [2, 4]), lambda: [], {2})
    #            begin  user turn  its end, answer header  answer     its end, next conversation
    drawn = [0, 10, 11, 2, 0, 12, 2, 0, 13]
    assert [chat.next(i) for i in drawn] == [3, 10, 11, 2, 4, 12, 2, 3, 13]


def test_endless_user_turns_are_cut() -> None:
    chat = selfgen._Writer(([3], [2, 4]), lambda: [], {2}, longest=2)
    assert [chat.next(10) for _ in range(6)] == [3, 10, 10, 2, 4, 10]


@pytest.mark.parametrize(
    ("share", "talks"), [(0.0, ""), (0.25, "37"), (0.5, "1357"), (1.0, "01234567")]
)
def test_the_share_of_conversations(source: Source, share: float, talks: str) -> None:
    tokenizer = source.tokenizer()
    writing = Writing(conversations=share, text_tokens=6)
    ids = load_windows("self", tokenizer, 4, 12, source=source, writing=writing).ids
    first = ids.view(8, 6)[:, 0] == tokenizer.convert_tokens_to_ids("<user>")
    assert first.nonzero().flatten().tolist() == [int(i) for i in talks]


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"conversations": 1.5}, {"text_tokens": 1}, {"user_tokens": 0}]
)
def test_writing_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Writing(**wrong)


def test_chat_parts() -> None:
    tokenizer = tiny.tiny_tokenizer(chat=True)
    assert selfgen.chat_parts(tokenizer) == ([3], [2, 4])
    assert selfgen.chat_parts(tiny.tiny_tokenizer()) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert selfgen.chat_parts(tokenizer) is None


@pytest.mark.parametrize(
    "family", ["falcon_h1", "gemma4", "gemma4_e", "lfm2", "qwen3_5_text", "qwen3_vl"]
)
def test_hybrids_and_wrappers_write(family: str) -> None:
    """Token by token, with what each family keeps of a text, as in one forward."""
    model = family_models.build(family)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    selfgen.fold_attention(model)
    cache = kv_slots.cache_with_room(model, 9)
    steps = [model(one, past_key_values=cache, use_cache=True).logits for one in ids.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-4)
    assert selfgen.batch_size(model, 8, 9) == 8


def test_memory_of_a_text_is_measured() -> None:
    model = tiny.tiny_llama()  # two blocks, two key heads of 16, float32, and a vocabulary of 384
    keys = 2 * 2 * 2 * 16 * 4
    assert kv_slots.bytes_of_text(model, 10) == 10 * keys + 3 * 384 * 4
