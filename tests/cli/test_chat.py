"""`dropbydrop chat`: piped, with switches of precision on one cache, against a plain reference."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

from dropbydrop.cli import main as cli
from dropbydrop.cli.chat import answer
from dropbydrop.kernels.registry import VARIABLE, select
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.runtime.load import load
from dropbydrop.runtime.views import view
from dropbydrop.serve.conversation import Conversation
from dropbydrop.serve.precisions import Precisions
from dropbydrop.serve.sampling import Sampling
from dropbydrop.serve.text import Text, TextStream
from dropbydrop.system.errors import DropError
from tiny import sign, write_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("chat") / "out", chat=True)


def chat(out: Path, typed: str, *options: str) -> tuple[Any, list[str]]:
    """The result of the command, and its remarks."""
    done = CliRunner().invoke(
        cli.app, ["chat", str(out), "--max-new-tokens", "6", *options], input=typed
    )
    return done, done.stderr.splitlines()


def conversation(out: Path) -> Conversation:
    greedy = Sampling(temperature=0.0)
    return Conversation(Precisions(out, None), Text(load_tokenizer(out)), greedy)


@torch.inference_mode()
def reference(out: Path, plan: list[tuple[str, int]], most: int) -> list[str]:
    """Greedy answers to (message, bits). At every turn all is computed anew, token by token on
    transformers' dynamic cache, each token at the precision that it was first computed at."""
    base, tokenizer = load(out, 4), load_tokenizer(out)
    views = {bits: view(base, bits) for _, bits in plan}
    messages, known, answers = [], [], []  # known: (token, bits) of all that was computed
    for message, bits in plan:
        messages.append({"role": "user", "content": message})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        same = 0
        while same < min(len(prompt) - 1, len(known)) and known[same][0] == prompt[same]:
            same += 1
        known = known[:same] + [(token, bits) for token in prompt[same:]]
        cache, made, todo = None, [], list(known)
        while True:
            for token, at in todo:
                result = views[at](torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                cache = result.past_key_values
            best = int(result.logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            made.append(best)
            if len(made) == most:
                break
            todo = [(best, bits)]
            known += todo
        answers.append(tokenizer.decode(made, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


PLAN = [("the river", 3), ("the old mill", 2), ("the sea", 4)]


def test_switches_of_precision_equal_the_reference(out: Path) -> None:
    talk = conversation(out)
    found, cached = [], []
    for message, bits in PLAN:
        found.append("".join(talk.answer(message, bits, 6)))
        assert talk.turn is not None
        cached.append(talk.turn.cached)
        assert talk.turn.bits == bits
        assert talk.turn.bytes_per_token == talk.precisions.bytes_of(bits) > 0
    assert found == reference(out, PLAN, 6)
    assert cached[0] == 0
    assert 0 < cached[1] < cached[2]  # earlier turns are not computed again
    alone = conversation(out)
    assert "".join(alone.answer(PLAN[0][0], 3, 6)) == found[0]


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_a_cut_cache_and_a_new_one_answer_alike(
    out: Path, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is DynamicCache:
        monkeypatch.setenv(VARIABLE, "torch")
    elif not select().native:
        pytest.skip("no native kernel here")
    talk, fresh = conversation(out), conversation(out)
    first = "".join(talk.answer("the river runs past the mill", 3, 6))
    talk.messages = []  # as if the earlier turn had been another: the shared beginning is kept
    again = "".join(talk.answer("the river runs past the sea", 3, 6))
    assert talk.turn is not None
    assert talk.turn.cached > 0
    assert type(talk._cache) is kind
    assert again == "".join(fresh.answer("the river runs past the sea", 3, 6))
    talk.reset()
    assert "".join(talk.answer("the river runs past the mill", 3, 6)) == first


@pytest.mark.parametrize("call", [1, 5])
@pytest.mark.parametrize("where", ["lm_head", "model.layers.1.mlp"])
def test_an_interrupt_within_the_model(out: Path, where: str, call: int) -> None:
    """What the cache holds then is not known: the next answer is as if it had none."""
    talk, fresh, calls = conversation(out), conversation(out), []

    def interrupt(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == call:
            raise KeyboardInterrupt

    hook = talk.precisions.model(3).get_submodule(where).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(talk.answer("the river runs", 3, 6))
    hook.remove()
    fresh.messages = list(talk.messages)
    found, expected = (list(one.answer("the sea", 3, 6)) for one in (talk, fresh))
    assert found == expected


def test_an_interrupted_answer_is_kept(out: Path) -> None:
    talk = conversation(out)
    pieces = talk.answer("the river", 3, 6)
    said = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.turn is not None
    assert (talk.turn.tokens, talk.turn.reason) == (2, "interrupted")
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    assert "".join(talk.answer("the sea", 2, 6))


def test_piped(out: Path) -> None:
    typed = "/help\nthe river\n\n/bits 2\nthe old mill\n/bits 4\nthe sea\n/quit\nnever read\n"
    done, remarks = chat(out, typed, "--bits", "3")
    assert done.exit_code == 0, done.output
    assert done.stdout == "".join(f"{text}\n" for text in reference(out, PLAN, 6))
    figures = [line for line in remarks if "MB a token" in line]
    assert [line[:6] for line in figures] == ["3 bits", "2 bits", "4 bits"]
    assert all("tokens/s" in line for line in figures)
    assert any(line.startswith("/reset") for line in remarks)


def test_json_is_all_of_stdout(out: Path) -> None:
    done, _ = chat(out, "the river\n/reset\nthe river\n", "--json", "--system", "be brief")
    found = json.loads(done.stdout)
    assert [turn["bits"] for turn in found["turns"]] == [4, 4]
    assert found["levels"] == [2, 3, 4]
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant"]
    assert found["turns"][0]["tokens"] == found["turns"][1]["tokens"]


def test_mistakes_do_not_end_a_conversation(out: Path) -> None:
    done, remarks = chat(out, f"/bits 7\n/bits x\n{'sea ' * 400}\nthe river\n")
    assert done.exit_code == 0
    errors = [line for line in remarks if line.startswith("error: ")]
    assert len(errors) == 3
    assert "bits 'x': give a level" in errors[1]
    assert "Begin a new one with /reset" in errors[2]
    assert any(line.startswith("4 bits") and "MB a token" in line for line in remarks)


def test_a_model_without_turns_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out")
    with pytest.raises(DropError, match="no chat template"):
        conversation(folder)


def test_a_conversation_of_no_tokens_is_refused(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "silent")
    nothing = "{% if messages|length > 9 %}x{% endif %}"
    (tmp_path / "silent" / "chat_template.jinja").write_text(nothing)
    sign(tmp_path / "silent")
    done, remarks = chat(tmp_path / "silent", "hello\n/bits 2\n")
    assert done.exit_code == 0
    assert any("are no tokens" in line for line in remarks)
    assert "2 bits from now on" in remarks


def test_a_terminal_sees_no_control_characters(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TextStream, "push", lambda self, token: "\x1b]0;x\x07é\n")
    for terminal, shown in ((True, "\\x1b]0;x\\x07é\n"), (False, "\x1b]0;x\x07é\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        answer(conversation(out), "hello", 4, 2, quiet=False)
        assert capsys.readouterr().out.startswith(shown * 2)
