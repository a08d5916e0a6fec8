"""Folders that are damaged, replaced or removed while a model of them is in use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import dropbydrop
from dropbydrop.checkpoint import checked_file
from dropbydrop.system.errors import DropError, FormatError
from tiny import COUNTS, VOCAB, sign, write_checkpoint

dropbydrop.register()
IDS = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, code: str) -> tuple[Path, Path]:
    """Two checkpoints of the same sizes."""
    folder = tmp_path_factory.mktemp("changes")
    return tuple(write_checkpoint(folder / f"{n}", code=code, seed=n) for n in range(2))  # type: ignore


@pytest.fixture
def out(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "out"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def replace(out: Path, other: Path) -> None:
    shutil.move(out, out.with_name("old"))
    shutil.copytree(other, out)


def test_a_folder_that_is_replaced(folders: tuple[Path, Path], out: Path) -> None:
    """What is loaded stays; planes of the other checkpoint are not mixed in."""
    expected = logits(dropbydrop.load(out, 2))
    for verify in (True, False):
        model = dropbydrop.load(out, 2, verify=verify)
        replace(out, folders[1])
        assert torch.equal(logits(model), expected)
        with pytest.raises(FormatError, match=r"is not what the manifest|holds another checkpoint"):
            dropbydrop.load_planes(model, 4)
        assert torch.equal(logits(model), expected)
        shutil.rmtree(out)
        shutil.move(out.with_name("old"), out)


def test_a_folder_that_is_removed(out: Path) -> None:
    model = dropbydrop.load(out, 2)
    shutil.rmtree(out)
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(FormatError, match="is needed, but"):
        dropbydrop.load_planes(model, 4)


def test_an_upgrade_of_a_replaced_folder(folders: tuple[Path, Path], out: Path) -> None:
    model = dropbydrop.load(out, 2)
    replace(out, folders[1])
    with pytest.raises(FormatError, match="is not what the manifest says"):
        dropbydrop.upgrade(model).wait(4, 20.0)


def test_a_file_that_is_exchanged_while_transformers_reads(
    folders: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was compared, before it is read by its name."""
    load = transformers.PreTrainedModel._load_pretrained_model

    def late(*args: Any, **kwargs: Any) -> Any:
        (out / "plane-1.safetensors").unlink()
        shutil.copy(folders[1] / "plane-1.safetensors", out)
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", staticmethod(late))
    with pytest.raises(FormatError, match="was replaced, removed or written to"):
        dropbydrop.load(out, 2)


@pytest.mark.parametrize("name", ["model.safetensors", "plane-1.safetensors"])
def test_a_file_that_is_exchanged_while_its_header_is_read(
    out: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch says of a shorter file that its mapping would not fit, as a RuntimeError."""
    opened = checked_file.safe_open

    def late(path: Path, **options: Any) -> Any:
        if path.name == name:
            save_file({"x": torch.ones(1)}, out / "new")
            (out / "new").replace(path)
            raise RuntimeError("size is smaller than the required mapping size")
        return opened(path, **options)

    monkeypatch.setattr(checked_file, "safe_open", late)
    with pytest.raises(FormatError, match="was replaced, removed or written to"):
        dropbydrop.load(out, 2)


def from_pretrained(out: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@pytest.mark.parametrize("read", [dropbydrop.load, from_pretrained])
def test_damage_is_refused(out: Path, code: str, read: Any) -> None:
    for name in (f"plane-{COUNTS[code][4]}.safetensors", "model.safetensors", "tokenizer.json"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 16]))
        with pytest.raises(FormatError, match=f"{name} is not what the manifest says"):
            read(out)
        (out / name).write_bytes(data)
    (out / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes() + b" ")
    assert dropbydrop.load(out, verify=False) is not None


@pytest.mark.parametrize("read", [dropbydrop.load, from_pretrained])
@pytest.mark.parametrize(
    ("key", "value"),
    [("attn_implementation", "kernels-community/x"), ("transformers_weights", "other.safetensors")],
)
def test_configs_that_fetch_or_redirect(out: Path, read: Any, key: str, value: str) -> None:
    """Before the model is built, and so before anything is fetched."""
    shutil.copy(out / "model.safetensors", out / "other.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, key: value}))
    sign(out, "config.json")
    with pytest.raises(DropError, match=f"{value}|{key}"):
        read(out)


@pytest.mark.parametrize("read", [dropbydrop.load, from_pretrained])
def test_an_adapter_beside_it(out: Path, read: Any) -> None:
    (out / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "x"}'
    )
    with pytest.raises(DropError, match="adapter"):
        read(out)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "none such"}, {"num_attention_heads": 0}, {"vocab_size": "x"}]
)
def test_configs_that_transformers_refuses(out: Path, change: dict[str, Any]) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    sign(out, "config.json")
    with pytest.raises(DropError, match=r"transformers"):
        dropbydrop.load(out)


def test_a_config_of_a_billion_blocks(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    sign(out, "config.json")
    with pytest.raises(DropError, match=r"blocks|layers"):
        dropbydrop.load(out)


def test_a_parameter_of_another_shape(out: Path) -> None:
    """Refused by us, with the shapes, before transformers reads."""
    from safetensors.torch import load_file, save_file

    from dropbydrop.checkpoint.tensor_files import METADATA

    for value in (torch.ones(3), torch.ones(64, 2), torch.ones(64, dtype=torch.int8)):
        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"] = value
        save_file(tensors, out / "model.safetensors", METADATA)
        sign(out, "model.safetensors")
        with pytest.raises(FormatError, match=r"model.norm.weight.* (F32|I8) \[.*but \[64\]"):
            dropbydrop.load(out)
