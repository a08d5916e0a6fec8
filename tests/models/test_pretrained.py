"""Nothing of a folder is run, and there is one door to transformers' Auto classes."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel
from typer.testing import CliRunner

import dropbydrop
import tiny
from dropbydrop.cli.main import app
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.pretrained import config_of, model_from, read_model, refuse_code
from dropbydrop.models.sources import convert_gguf, original_of, resolve
from dropbydrop.system.errors import DropError, FormatError, UnsupportedModelError
from tiny import copy_of, write_gguf

ROOT = Path(__file__).parents[2]
DOOR = "src/dropbydrop/models/pretrained.py"
CLASSES = {
    "AutoConfig": "code.X",
    "AutoModelForCausalLM": "code.X",
    "AutoTokenizer": ["code.X", None],
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("hf") / "tiny-llama", "llama")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("ck") / "out")


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who says yes to everything that is asked."""
    monkeypatch.setattr(builtins, "input", lambda *asked: "y")


def edit(file: Path, **keys: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **keys}))


def with_code(folder: Path, *files: str) -> Path:
    """Have `files` of a folder name code in it; returns the file that appears if it runs."""
    ran = folder / "RAN"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').write('x')\nclass X: pass\n")
    for name in files:
        edit(folder / name, auto_map=CLASSES, tokenizer_class="X")
    return ran


def refused(*argv: object) -> str:
    result = CliRunner().invoke(app, [str(part) for part in argv], input="y\n" * 9)
    assert isinstance(result.exception, DropError), (result.output, result.exception)
    return str(result.exception)


def test_there_is_one_door() -> None:
    calls = []
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("research/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = (
                node.func.attr
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                else ""
            )
            if called in {"from_pretrained", "from_config", "get_config_dict", "pipeline"}:
                calls.append(str(path.relative_to(ROOT)))
                given = {k.arg: k.value for k in node.keywords}  # type: ignore[attr-defined]
                answer = given.get("trust_remote_code")
                assert isinstance(answer, ast.Constant)
                assert answer.value is False
    assert calls == [DOOR] * 4


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model(llama: Path, tmp_path: Path, file: str, known: bool) -> None:
    source = copy_of(llama, tmp_path / "model")
    ran = with_code(source, file)
    if file == "config.json" and not known:
        edit(source / file, model_type="mine")
    text = tmp_path / "text.txt"
    text.write_text("the river runs past the old mill " * 200)
    for more in ([], ["--dry-run"]):
        assert "auto_map" in refused(
            "quantize", source, tmp_path / "out", "--calibration", text, "--seq-len", 16, *more
        )
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


def test_code_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "ck")
    ran = with_code(tmp_path / "ck", "tokenizer_config.json")
    text = tmp_path / "text.txt"
    text.write_text("the river runs past the old mill " * 200)
    assert "auto_map" in refused("generate", tmp_path / "ck", "--prompt", "a")
    assert "auto_map" in refused("eval", tmp_path / "ck", "--text", text, "--seq-len", 16)
    assert not ran.exists()


def test_code_of_a_reference_and_of_what_a_checkpoint_says_it_was_made_from(
    llama: Path, checkpoint: Path, tmp_path: Path
) -> None:
    source = copy_of(llama, tmp_path / "model")
    ran = with_code(source, "config.json")
    text = tmp_path / "text.txt"
    text.write_text("the river runs past the old mill " * 200)
    common = ["--text", text, "--seq-len", 16, "--reference", source]
    assert "auto_map" in refused("eval", checkpoint, *common)
    config = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        original_of(checkpoint, config, str(source), str(source))
    with pytest.raises(DropError, match="auto_map"):  # as its provenance says
        original_of(checkpoint, config, str(source))
    assert not ran.exists()


def test_code_beside_a_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "a.gguf")
    alone = convert_gguf(tmp_path / "a.gguf")
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "a.gguf").rename(place / "a.gguf")
    ran = with_code(place, "config.json", "tokenizer_config.json")
    edit(place / "adapter_config.json", base_model_name_or_path="x")
    shutil.rmtree(alone)
    assert convert_gguf(place / "a.gguf") == alone
    assert not ran.exists()
    assert "X" not in (alone / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"transformers_weights": "other.safetensors"}, "another file"),
        ({"attn_implementation": "someone/kernel"}, "fetch a kernel"),
        ({"_attn_implementation": {"": "flash_attention_2"}}, "fetch a kernel"),
        ({"_experts_implementation_internal": "sonicmoe"}, "fetch a kernel"),
        ({"text_config": {"inner": [{"auto_map": {"AutoModel": "a--b.C"}}]}}, "auto_map"),
    ],
)
def test_keys_that_fetch_code_or_other_weights(
    llama: Path, tmp_path: Path, keys: dict[str, Any], match: str
) -> None:
    source = copy_of(llama, tmp_path, **keys)
    with pytest.raises(UnsupportedModelError, match=match):
        resolve(source)
    with pytest.raises(UnsupportedModelError, match=match):
        config_of(source)


def test_harmless_values_of_such_keys(llama: Path, tmp_path: Path) -> None:
    refuse_code(copy_of(llama, tmp_path, auto_map={}, _attn_implementation="sdpa", x=None))


def test_an_adapter_beside_the_weights(llama: Path, tmp_path: Path) -> None:
    source = copy_of(llama, tmp_path)
    edit(source / "adapter_config.json", base_model_name_or_path="x", peft_type="LORA")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        resolve(source)
    (source / "config.json").unlink()  # an adapter's own folder
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        resolve(source)


ODD: list[Callable[[dict[str, Any]], Any]] = [
    lambda c: c | {"use_cache": "maybe"},
    lambda c: c | {"max_position_embeddings": "256"},
    lambda c: c | {"hidden_size": "64"},
    lambda c: c | {"hidden_size": -8},
    lambda c: c | {"num_attention_heads": 5, "head_dim": None},
    lambda c: c | {"num_attention_heads": 0, "head_dim": None},
    lambda c: c | {"tie_word_embeddings": "no"},
    lambda c: c | {"model_type": ["llama"]},
    lambda c: c | {"model_type": None},
    lambda c: c | {"text_config": {"hidden_size": 64}},
    lambda c: c | {"layer_types": ["a", "b"]},
    lambda c: c | {"rope_parameters": 7},
    lambda c: c | {"dtype": "auto"},
    lambda c: c | {"dtype": 3},
    lambda c: c | {"architectures": 7},
    lambda c: c | {"vocab_size": 10**30},
    lambda c: c | {"num_hidden_layers": 10**9},
    lambda c: c | {"eos_token_id": {"a": 1}},
    lambda c: [c],
    lambda c: {},
]


@pytest.mark.parametrize("change", range(len(ODD)))
def test_no_config_is_a_traceback(llama: Path, tmp_path: Path, change: int) -> None:
    from dropbydrop.quantization.config import QuantizeConfig
    from dropbydrop.quantization.job import prepare

    source = copy_of(llama, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(ODD[change](config)))
    with suppress(DropError):  # some are harmless
        prepare(source, QuantizeConfig(windows=2, seq_len=16, device="cpu"))


def test_json_that_is_deeper_than_python(llama: Path, tmp_path: Path) -> None:
    source = copy_of(llama, tmp_path)
    (source / "config.json").write_text("[" * 200_000)
    with pytest.raises(FormatError, match="JSON"):
        resolve(source)


def _through_the_blocks(folder: Path) -> Any:
    return BlockRunner.open(folder, dtype=torch.float32).model


@pytest.mark.parametrize(
    ("road", "of"),
    [
        (lambda folder: read_model(folder), "model"),
        (lambda folder: model_from(config_of(folder)), "model"),
        (_through_the_blocks, "model"),
        (lambda folder: dropbydrop.load(folder, bits=3), "checkpoint"),
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder), "checkpoint"),
    ],
)
def test_capped_scores_stay_capped(
    road: Callable[[Path], Any], of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.19 attends through sdpa for Gemma 2, which leaves the cap out in silence."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    model = tiny.tiny_model("gemma2")
    assert AutoModelForCausalLM.from_config(model.config)  # as that release does
    folder = tmp_path / "gemma2"
    if of == "model":
        model.save_pretrained(folder)
    else:
        dropbydrop.register()
        tiny.write_checkpoint(folder, model)
    assert road(folder).config._attn_implementation == "eager"
