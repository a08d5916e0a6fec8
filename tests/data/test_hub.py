"""Calibration from hub datasets: with a stand-in for the library, and for its cache on disk."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.coding.encoder import Effort
from dropbydrop.data import hub as hub_text
from dropbydrop.data.calibration import load_windows
from dropbydrop.data.hub import parse, read_hub_text
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system.errors import CalibrationError

ROWS = [
    f"{i} the river runs past the old mill and three ships left in the morning" for i in range(90)
]


def test_names() -> None:
    assert parse("hub:owner/name") == ("owner/name", None, "train")
    assert parse("hub:owner/name:dev") == ("owner/name", None, "dev")
    assert parse("hub:owner/name:raw-v1:test") == ("owner/name", "raw-v1", "test")
    for wrong in ("hub:", "hub:a::b", "hub:a:b:c:d", "hub:a:"):
        with pytest.raises(CalibrationError, match="hub:NAME:CONFIG:SPLIT"):
            parse(wrong)


class Library(ModuleType):
    """What we use of `datasets`; counts the rows that are read."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        super().__init__("datasets")
        self.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        self.rows, self.read, self.asked = rows, 0, {}

    def load_dataset(self, name: str, config: str | None, **options: Any) -> Iterator[Any]:
        self.asked = {"name": name, "config": config, **options}
        for row in self.rows:
            self.read += 1
            yield row


def library(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Library:
    stand_in = Library(rows)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return stand_in


def test_only_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = library(monkeypatch, [{"text": row, "id": 1} for row in ROWS])
    text = read_hub_text("hub:someone/words:small:dev", 200)
    assert text == "\n\n".join(ROWS)[:200]
    assert stand_in.read == 3
    assert stand_in.asked == {
        "name": "someone/words", "config": "small", "split": "dev", "streaming": True
    }  # fmt: skip


def test_rows_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, [{"question": "why?", "answer": 42}])
    with pytest.raises(CalibrationError, match=r"question \(str\), answer \(int\)"):
        read_hub_text("hub:someone/quiz", 100)
    library(monkeypatch, [{"text": " "}] * 3)
    with pytest.raises(CalibrationError, match="holds no text"):
        read_hub_text("hub:someone/blank", 100)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_hub_text("hub:someone/words", 100)


def test_windows_are_those_of_the_same_text_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(monkeypatch, [{"text": row} for row in ROWS])
    (tmp_path / "words.txt").write_text("\n\n".join(ROWS))
    tokenizer = tiny.tiny_tokenizer()
    found = load_windows("hub:someone/words", tokenizer, 4, 32, seed=3)
    expected = load_windows(tmp_path / "words.txt", tokenizer, 4, 32, seed=3)
    assert torch.equal(found.ids, expected.ids)
    assert found.description == {**expected.description, "text": "hub:someone/words"}
    with pytest.raises(CalibrationError, match=r"hub:someone/words has .* tokens"):
        load_windows("hub:someone/words", tokenizer, 4, 9999)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache as it is after a download of someone/words, and no network."""
    datasets = pytest.importorskip("datasets")
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    datasets.load_dataset("json", data_files={"train": str(source)}, cache_dir=tmp_path / "made")
    (made,) = (tmp_path / "made" / "json").glob("*/*/*/")
    place = tmp_path / "cache" / "someone___words" / "default" / "0.0.0" / ("0" * 40)
    place.mkdir(parents=True)
    (made / "json-train.arrow").rename(place / "words-train.arrow")
    info = json.loads((made / "dataset_info.json").read_text())
    info |= {"dataset_name": "words", "config_name": "default"}
    info["splits"]["train"]["dataset_name"] = "words"
    (place / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_library_itself_offline(cache: Path) -> None:
    assert read_hub_text("hub:someone/words", 10**6) == "\n\n".join(ROWS)
    with pytest.raises(CalibrationError, match=r"hub:someone/absent .*someone/absent"):
        read_hub_text("hub:someone/absent", 100)
    with pytest.raises(CalibrationError, match=r"dev.*train"):
        read_hub_text("hub:someone/words:dev", 100)
    with pytest.raises(CalibrationError, match=r"hub:someone/words:big:train .*big"):
        read_hub_text("hub:someone/words:big:train", 100)


def test_quantize_from_the_caches_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and text by their ids, offline; a snapshot's files are links into `blobs`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(jobs, "EFFORTS", {"balanced": Effort(2, 1, 0)})
    folder = tiny.save_tiny(tmp_path / "model", "qwen2", max_shard_size="100KB")
    repo, revision = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    for name in ("refs", "blobs", f"snapshots/{revision}"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for i, file in enumerate(sorted(folder.iterdir())):
        (repo / "blobs" / f"{i:040}").write_bytes(file.read_bytes())
        (repo / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{i:040}")
    (tmp_path / "words.txt").write_text("\n\n".join(ROWS))
    size: dict[str, Any] = {"windows": 4, "seq_len": 32, "progress": False}
    found = quantize.quantize(
        "someone/tiny", tmp_path / "one", calibration="hub:someone/words", **size
    )
    quantize.quantize(folder, tmp_path / "two", calibration=tmp_path / "words.txt", **size)
    assert Checkpoint.open(found.out).quantization.provenance["base_model"] == "someone/tiny"
    for file in (tmp_path / "two").glob("*.safetensors"):
        assert (found.out / file.name).read_bytes() == file.read_bytes()
    assert not any(file.is_symlink() for file in found.out.iterdir())
