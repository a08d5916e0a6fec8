"""Tuning of checkpoints with trellis planes: decoding, the grid of the values, the life-cycle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.tuning.decode import decode_levels
from dropbydrop.tuning.grid import rounded_part, table_of, top_of, values_of
from dropbydrop.tuning.optimizer import Values
from dropbydrop.tuning.pipeline import tune
from dropbydrop.tuning.student import Student
from naive_trellis import normal_set
from tiny import save_tiny

LEVELS = (2, 3, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune-trellis")
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    save_tiny(root / "model", "llama-tied", num_hidden_layers=2)
    quantize(
        root / "model", root / "out", LEVELS, code="trellis", preset="fast",
        calibration=root / "text.txt", windows=4, seq_len=64, progress=False,
    )  # fmt: skip
    return root


def random_codes(d_out: int, d_in: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    planes = normal_set(LEVELS).planes
    codes = [
        torch.randint(0, 256, plane.shape(d_out, d_in), generator=generator, dtype=torch.uint8)
        for plane in planes
    ]
    return codes, torch.rand(d_out, generator=generator) + 0.5


@pytest.mark.parametrize("prefixes", [(1, 2, 3), (1, 3), (2,)])
def test_decoding_and_gradients_are_those_of_the_definition(prefixes: tuple[int, ...]) -> None:
    books, (codes, scales) = normal_set(LEVELS), random_codes(13, 5)
    index = [books.index(m, plane, 13) for m, plane in enumerate(codes)]
    for weight, count in zip(
        decode_levels(index, books.entries, scales, prefixes), prefixes, strict=True
    ):
        assert torch.equal(weight, books.decode(codes, scales, count))

    leaves = [t.double().requires_grad_() for t in (*books.entries, scales)]

    def loss(decoded: list[Tensor]) -> Tensor:
        return torch.stack([(d.sin() * (1 + i)).sum() for i, d in enumerate(decoded)]).sum()

    naive = [
        leaves[-1][:, None] * sum(leaves[m][index[m].long(), 0] for m in range(count))
        for count in prefixes
    ]
    expected = torch.autograd.grad(loss(naive), leaves, allow_unused=True)
    got = torch.autograd.grad(
        loss(decode_levels(index, leaves[:-1], leaves[-1], prefixes)), leaves, allow_unused=True
    )
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("largest", [63, 40])
def test_what_is_stored_is_on_the_grid_already(largest: int) -> None:
    ints = torch.arange(-largest, largest + 1, dtype=torch.int8)[:64]
    part = {"": ints, ".scale": torch.tensor([0.0371])}
    values, top = values_of(part), top_of(part)
    assert top == largest
    again = rounded_part(values, top)
    assert torch.equal(again[""], ints)
    torch.testing.assert_close(again[".scale"], part[".scale"])
    torch.testing.assert_close(table_of(values, top)[:, 0], values, rtol=1e-6, atol=0)


def test_training_sees_the_rounding_and_its_gradient_passes() -> None:
    values = torch.tensor([-1.0, 0.013, 0.51, 0.49], requires_grad=True)
    table = table_of(values, 63)
    torch.testing.assert_close(table[:, 0] * 63, torch.tensor([-63.0, 1.0, 32.0, 31.0]),
                               rtol=1e-6, atol=1e-6)  # fmt: skip
    (table[:, 0] * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_rounded_values_are_integers_and_a_scale() -> None:
    values = Values({"c": torch.randn(64), "m": torch.ones(3)}, set(), torch.device("cpu"),
                    {"c": 63})  # fmt: skip
    for number in range(1, 20):
        values.grad.normal_()
        values.step(number, 0.1)
    out = values.rounded()
    assert set(out) == {"c", "c.scale", "m"}
    assert out["c"].dtype == torch.int8
    assert int(out["c"].abs().max()) == 63
    leaf = values.leaves["c"].detach()
    assert torch.equal(
        values_of({"": out["c"], ".scale": out["c.scale"]}), table_of(leaf, 63)[:, 0]
    )


def test_the_student_decodes_what_is_stored(place: Path) -> None:
    checkpoint = Checkpoint.open(place / "out")
    student = Student(checkpoint, place / "model", "all", (4,), "cpu")
    for number, group in enumerate(checkpoint.quantization.input_groups):
        books, rotation = checkpoint.read_set(group.codebooks), checkpoint.read_rotation(number)
        for module in group.modules:
            codes = [checkpoint.read_codes(module, m) for m in (1, 2, 3)]
            scales = checkpoint.read(f"{module}.scales")
            expected = rotation.transpose(books.decode(codes, scales, 3))
            torch.testing.assert_close(student.dense_weight(module), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", ["all", "scales"])
@pytest.mark.parametrize("method", ["blocks", "distill"])
def test_tuning_lowers_the_loss_on_other_windows(
    place: Path, tmp_path: Path, method: str, train: str
) -> None:
    report = tune(
        place / "out", tmp_path / "tuned", model=str(place / "model"), method=method, train=train,
        calibration=place / "text.txt", windows=6, seq_len=48, epochs=8, learning_rate=2e-3,
        progress=False, device="cpu",
    )  # fmt: skip
    assert sum(after / before for before, after in report.loss.values()) < len(LEVELS)
    old, new = Checkpoint.open(place / "out"), Checkpoint.open(tmp_path / "tuned")
    assert new.verify() == []
    for m in (1, 2, 3):
        name = f"plane-{m}.safetensors"
        assert (old.path / name).read_bytes() == (new.path / name).read_bytes()
    stored = load_file(new.path / "model.safetensors")
    groups = new.quantization.input_groups
    if train == "scales":
        assert new.quantization.sets == ("universal",)
        return
    assert new.quantization.sets == tuple(f"input-group-{i}" for i in range(len(groups)))
    before, moved = old.read_set("universal"), []
    for i in range(len(groups)):
        after = new.read_set(f"input-group-{i}")
        for m, (one, other) in enumerate(zip(before.parts, after.parts, strict=True), 1):
            assert torch.equal(one[".taps"], other[".taps"])
            assert stored[f"codebooks.input-group-{i}.{m}"].dtype == torch.int8
            moved.append(not torch.equal(values_of(one), values_of(other)))
    assert any(moved) if method == "blocks" else all(moved)  # blocks that were no better stay
    assert len((new.path / "tune-log.jsonl").read_text().splitlines()) >= 2
    assert json.loads((new.path / "config.json").read_text())["quantization_config"]["provenance"][
        "tuning"
    ]
