"""`quantize --code trellis` on a tiny model: what is stored, what is written about it, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import CARD_FILE, LOG_FILE
from dropbydrop.coding.codebooks import universal_set
from dropbydrop.coding.objective import weighted_errors
from dropbydrop.coding.planes import TrellisPlane
from dropbydrop.data.calibration import load_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.quantization.estimate import estimate
from dropbydrop.quantization.job import prepare
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.system.errors import DropError
from tiny import save_tiny

LEVELS = (2, 3, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trellis")
    save_tiny(root / "model", "llama-tied", num_hidden_layers=2)
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    quantize(root / "model", root / "out", LEVELS, config=config(root), progress=False)
    return root


def config(root: Path) -> QuantizeConfig:
    return QuantizeConfig(
        code="trellis", calibration=str(root / "text.txt"), preset="fast", windows=4, seq_len=64
    )


def test_what_is_stored_decodes_to_the_errors_of_the_log(root: Path) -> None:
    checkpoint = Checkpoint.open(root / "out")
    q = checkpoint.quantization
    assert (q.kind, [plane.bits for plane in q.planes]) == ("trellis", [2, 1, 1])
    assert q.provenance["code"] == "trellis"
    books = checkpoint.read_set("universal")
    assert {plane.window for plane in q.planes if isinstance(plane, TrellisPlane)} == {12}
    for name, stored in universal_set(LEVELS, None, "trellis", 12).named().items():
        assert torch.equal(books.named()[name], stored)
    runner = BlockRunner.open(root / "model")
    ids = load_windows(root / "text.txt", load_tokenizer(root / "model"), 4, 64).ids
    statistics = runner.collect_statistics(0, runner.block(0), runner.embed(ids))
    lines = [json.loads(line) for line in (root / "out" / LOG_FILE).read_text().splitlines()]
    assert len(lines) == 14
    for number, group in enumerate(statistics.input_groups):
        rotation = checkpoint.read_rotation(number)
        for module in group.modules:
            weight = runner.read(f"{module}.weight", torch.float32)
            codes = [checkpoint.read_codes(module, m) for m in (1, 2, 3)]
            scales = checkpoint.read(f"{module}.scales")
            decoded = [
                rotation.transpose(books.decode(codes, scales, count)) for count in (1, 2, 3)
            ]
            errors = weighted_errors(weight, decoded, statistics.grams[group.name])
            (line,) = (line for line in lines if line["module"] == module)
            assert list(line["rel_error"].values()) == pytest.approx(errors, rel=1e-2)
            assert errors[0] > errors[1] > errors[2]


def test_the_card_says_which_planes_a_level_reads(root: Path) -> None:
    card = (root / "out" / CARD_FILE).read_text()
    assert "trellis" in card
    assert "(2: 1, 3: 2, 4: 3)" in card
    assert "bits=2)   # planes read: 1" in card


def test_sizes_of_the_estimate_are_those_of_the_files(root: Path, tmp_path: Path) -> None:
    found = estimate(prepare(root / "model", config(root)), tmp_path / "out")
    real = sum(file.stat().st_size for file in (root / "out").iterdir())
    assert found.bytes_out == pytest.approx(real, rel=0.1)
    planes = [sum(t.numel() for t in load_file(root / "out" / f"plane-{m}.safetensors").values())
              for m in (1, 2, 3)]  # fmt: skip
    assert planes[0] == pytest.approx(2 * planes[1], rel=0.1)


def test_refusals_name_the_way_out(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DropError, match=r"learned with --code trellis.*--tune"):
        QuantizeConfig(code="trellis", codebooks="learned")
    with pytest.raises(DropError, match=r"--bits 2,7 .*or take --code bytes"):
        quantize(root / "model", tmp_path / "out", (2, 7), config=config(root), progress=False)
    assert not (tmp_path / "out").exists()
