"""Tuning: gradients against naive references, and the life-cycle on tiny models."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.cli import main as cli
from dropbydrop.coding.code import decode, expand_codebook
from dropbydrop.coding.encoder import Effort
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system.errors import (
    CalibrationError,
    DropError,
    FormatError,
    MissingPlaneError,
    PrecisionError,
    UnsupportedModelError,
)
from dropbydrop.tuning import distill
from dropbydrop.tuning.blocks import output_errors
from dropbydrop.tuning.decode import decode_levels
from dropbydrop.tuning.optimizer import Values, rate_at
from dropbydrop.tuning.pipeline import tune
from dropbydrop.tuning.report import TuneReport
from dropbydrop.tuning.student import Student, refuse_experts
from tiny import save_tiny, tiny_model

LEVELS = (2, 3, 4)
QUICK: dict[str, Any] = {"windows": 6, "seq_len": 48, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a text, and a checkpoint of each model."""
    root = tmp_path_factory.mktemp("tune")
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    before = jobs.EFFORTS
    jobs.EFFORTS = dict.fromkeys(before, Effort(4, 1, 1))
    for family in ("llama-tied", "qwen2", "gemma2"):
        save_tiny(root / family, family)
        quantize.quantize(
            root / family,
            root / f"{family}-q",
            LEVELS,
            calibration=root / "text.txt",
            windows=4,
            seq_len=64,
            progress=False,
            head_bits=16 if family == "qwen2" else 8,
        )
    jobs.EFFORTS = before
    return root


def run(place: Path, out: Path, **changes: Any) -> TuneReport:
    settings = {"model": place / "llama-tied", "calibration": place / "text.txt", **QUICK}
    return tune(place / "llama-tied-q", out, **{**settings, **changes})


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# ------------------------------------------------------------------------------- decoding


def codes_and_tables(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Four planes for [6, 24], half codebooks, scales for three levels."""
    g = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 256, (6, 3), generator=g, dtype=torch.uint8) for _ in range(4)]
    codes[0][0], codes[0][1] = 5, 133  # repeated, and an entry with its mirror image
    stored = [torch.randn(128, 8, generator=g, dtype=dtype) / 2**m for m in range(4)]
    scales = torch.rand(6, generator=g, dtype=dtype) + 0.5
    return codes, stored, scales


def naive_levels(
    codes: list[Tensor], stored: list[Tensor], scales: Tensor, levels: tuple[int, ...]
) -> list[Tensor]:
    """Group by group, from the definition, with autograd."""
    out = []
    for level in levels:
        rows = []
        for r in range(codes[0].shape[0]):
            groups = []
            for j in range(codes[0].shape[1]):
                total = torch.zeros(8, dtype=stored[0].dtype)
                for m in range(level):
                    c = int(codes[m][r, j])
                    total = total + (stored[m][c] if c < 128 else -stored[m][c - 128])
                groups.append(total)
            rows.append(scales[r] * torch.cat(groups))
        out.append(torch.stack(rows))
    return out


@pytest.mark.parametrize("levels", [(2, 3, 4), (1, 4), (3,)])
def test_decoding_is_that_of_the_format_bit_for_bit(levels: tuple[int, ...]) -> None:
    codes, stored, scales = codes_and_tables(torch.float32)
    entries = [expand_codebook(book) for book in stored]
    got = decode_levels(codes, entries, scales, levels)
    for weight, level in zip(got, levels, strict=True):
        assert torch.equal(weight, decode(codes, entries, scales, level))


@pytest.mark.parametrize("levels", [(2, 3, 4), (1, 4), (3,)])
def test_gradients_of_decoding_equal_those_of_the_definition(levels: tuple[int, ...]) -> None:
    codes, stored, scales = codes_and_tables(torch.float64)
    leaves = [t.requires_grad_() for t in (*stored, scales)]
    weights = [torch.randn(6, 24, dtype=torch.float64) for _ in levels]

    def loss(decoded: list[Tensor]) -> Tensor:
        pairs = zip(weights, decoded, strict=True)
        return torch.stack([(w * d + d.square()).sum() for w, d in pairs]).sum()

    entries = [torch.cat([book, -book]) for book in stored]
    got = torch.autograd.grad(
        loss(decode_levels(codes, entries, scales, levels)),
        leaves,
        allow_unused=True,
    )
    expected = torch.autograd.grad(
        loss(naive_levels(codes, stored, scales, levels)), leaves, allow_unused=True
    )
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_gradients_of_decoding_equal_finite_differences() -> None:
    codes, stored, scales = codes_and_tables(torch.float64)

    def decoded(first: Tensor, last: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        books = [first, *stored[1:3], last]
        entries = [torch.cat([book, -book]) for book in books]
        return tuple(decode_levels(codes, entries, scale, LEVELS))

    inputs = [t.clone().requires_grad_() for t in (stored[0], stored[3], scales)]
    assert torch.autograd.gradcheck(decoded, inputs, fast_mode=True)


# ---------------------------------------------------------------------------- the student


def student_of(place: Path, family: str, **changes: Any) -> Student:
    settings: dict[str, Any] = {"train": "all", "levels": LEVELS, "device": "cpu", **changes}
    return Student(Checkpoint.open(place / f"{family}-q"), place / family, **settings)


def some_ids(n: int = 3, length: int = 17) -> Tensor:
    return torch.randint(5, 300, (n, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2"])
def test_student_computes_what_the_loaded_checkpoint_computes(place: Path, family: str) -> None:
    student, ids = student_of(place, family), some_ids()
    leaves = student.values().leaves
    with torch.no_grad():
        hidden = [student.runner.embed(ids)] * len(LEVELS)
        for i in range(student.runner.num_blocks):
            hidden = student.block(i, hidden, leaves, LEVELS)
        for h, level in zip(hidden, LEVELS, strict=True):
            loaded = dropbydrop.load(place / f"{family}-q", bits=level)
            expected = loaded(ids, use_cache=False).logits
            torch.testing.assert_close(student.logits(h, leaves), expected, rtol=1e-3, atol=2e-4)


def naive_values(checkpoint: Checkpoint, student: Student) -> dict[str, Tensor]:
    """Every trained tensor as a float32 leaf of its own."""
    return {n: t.float().clone().requires_grad_() for n, t in student.start.items()}


def naive_model(
    checkpoint: Checkpoint, student: Student, values: dict[str, Tensor], model: Any, level: int
) -> Any:
    """Logits as a function of ids: the transformers model, with weights decoded from `values`."""
    weights = {n: v for n, v in values.items() if n in dict(model.named_parameters())}
    for number, input_group in enumerate(checkpoint.quantization.input_groups):
        books = [values[f"codebooks.{student.sets[number]}.{m}"] for m in range(1, level + 1)]
        for module in input_group.modules:
            planes = [checkpoint.read_codes(module, m).long() for m in range(1, level + 1)]
            entries = [torch.cat([book, -book]) for book in books]
            total = sum(t[c] for t, c in zip(entries, planes, strict=True)).flatten(1)
            rotated = values[f"{module}.scales"][:, None] * total
            q = checkpoint.read_rotation(number).apply(torch.eye(input_group.d_in)).T
            weights[f"{module}.weight"] = rotated @ q
    embedding = student.runner.files.read("model.embed_tokens.weight", torch.float32)
    weights["model.embed_tokens.weight"] = embedding
    return lambda ids: functional_call(model, weights, (ids,), {"use_cache": False}).logits


@pytest.mark.parametrize("levels", [(2, 3, 4), (3,)])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2"])
def test_gradients_of_distillation_are_those_of_autograd(
    place: Path, family: str, levels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block, with recomputation and slabs of logits, against the whole model at once."""
    monkeypatch.setattr(distill, "LOGIT_VALUES", 384 * 5)
    student, ids = student_of(place, family), some_ids()
    teacher = BlockRunner.open(place / family)
    windows = distill.Windows(ids, distill.last_hidden(teacher, ids, False), 1)
    values = student.values()
    weights = {2: 0.5, 3: 1.0, 4: 3.0}
    own = dict(zip(levels, ([2, 0], [1, 2], [0, 1]), strict=False))  # windows of each level
    found = distill.divergence(student, teacher, values.leaves, windows, own, weights)

    model: Any = AutoModelForCausalLM.from_pretrained(place / family, dtype=torch.float32).eval()
    naive = naive_values(student.checkpoint, student)
    total = torch.zeros(())
    for level, value in found.items():
        log_p = torch.log_softmax(model(ids[own[level]], use_cache=False).logits, -1).detach()
        quantized = naive_model(student.checkpoint, student, naive, model, level)
        log_q = torch.log_softmax(quantized(ids[own[level]]), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert value == pytest.approx(float(kl.detach()), rel=1e-3)
        total = total + weights[level] * kl
    total.backward()
    for name, leaf in naive.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        got = values.leaves[name].grad
        assert got is not None
        torch.testing.assert_close(
            got, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()) + 1e-7
        )


def test_errors_of_a_block_are_those_of_the_definition(place: Path) -> None:
    student, teacher = student_of(place, "llama-tied"), BlockRunner.open(place / "llama-tied")
    x = teacher.embed(some_ids())
    x[:, 0] *= 5000  # a token of massive activations
    y = teacher.forward_block(0, teacher.block(0), x)
    values = student.values(0)
    assert set(values.leaves) == set(student.trained_in(0))
    assert values.leaves
    weights = {2: 1.0, 3: 2.0, 4: 3.0}
    got = output_errors(student, 0, values.leaves, x, y, weights)
    energy = y.square().sum(-1)
    clip = (20 * energy.median(-1, keepdim=True).values / energy).clamp(max=1)[..., None]
    assert float(clip.min()) < 0.5
    naive = {n: t.float().clone().requires_grad_() for n, t in student.start.items()}
    total = torch.zeros(())
    for level in LEVELS:
        (out,) = student.block(0, [x], naive, [level])
        error = (clip * (out - y).square()).sum() / (clip * (y - x).square()).sum()
        assert got[level] == pytest.approx(float(error.detach()), rel=1e-5)
        total = total + weights[level] * error
    total.backward()
    for name, leaf in values.leaves.items():
        torch.testing.assert_close(leaf.grad, naive[name].grad, rtol=1e-3, atol=1e-6)


def test_a_block_that_adds_nothing_has_errors_too(place: Path) -> None:
    """Zeros in its last matrices, as layers have that are to be trained."""
    student, teacher = student_of(place, "llama-tied"), BlockRunner.open(place / "llama-tied")
    values, x = student.values(0), teacher.embed(some_ids())
    got = output_errors(student, 0, values.leaves, x, x.clone(), dict.fromkeys(LEVELS, 1.0))
    nothing = output_errors(student, 0, values.leaves, 0 * x, 0 * x)
    assert all(0 < error < 1e12 for error in got.values())
    assert all(0 <= error < float("inf") for error in nothing.values())
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in values.leaves.values())


# ---------------------------------------------------------------------------- the optimizer


def test_steps_are_those_of_adam_on_relative_values() -> None:
    start = {"m.scales": torch.tensor([0.5, 2.0]), "b": torch.tensor([[3.0, -4.0]])}
    values = Values(start, {"m.scales"}, torch.device("cpu"))
    units = torch.tensor([0.5, 2.0, 12.5**0.5, 12.5**0.5])
    a = torch.zeros(4, requires_grad=True)
    adam = torch.optim.Adam([a], betas=(0.9, 0.99))
    begin = torch.tensor([0.5, 2.0, 3.0, -4.0])
    for number in range(1, 6):
        rate = rate_at(number, 5, 0.1)
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        (begin + units * a).sin().sum().backward()
        adam.step()
        sum(leaf.sin().sum() for leaf in values.leaves.values()).backward()  # type: ignore[union-attr]
        values.step(number, rate)
    flat = torch.cat([leaf.detach().flatten() for leaf in values.leaves.values()])
    torch.testing.assert_close(flat, (begin + units * a).detach())
    again = Values(start, {"m.scales"}, torch.device("cpu"))
    again.restore(values.state.clone())
    for name, leaf in again.leaves.items():
        assert torch.equal(leaf, values.leaves[name])


def test_every_epoch_has_every_window_and_levels_come_up_equally_often() -> None:
    plan = distill.schedule(12, 3, LEVELS, False, seed=0)
    seen = dict.fromkeys(LEVELS, 0)
    for step in plan:
        assert [levels for _, levels in step] == [(2,), (3,), (4,)]
        for chosen, (level,) in step:
            seen[level] += len(chosen)
    assert set(seen.values()) == {12}
    order = [w for step in plan for chosen, _ in step for w in chosen]
    assert all(sorted(order[low : low + 12]) == list(range(12)) for low in (0, 12, 24))
    whole = distill.schedule(5, 1, LEVELS, True, seed=0)
    assert sorted(w for step in whole for chosen, _ in step for w in chosen) == list(range(5))
    assert all(levels == LEVELS for step in whole for _, levels in step)


# ------------------------------------------------------------------------------ life-cycle


@pytest.fixture(scope="module")
def made(place: Path) -> dict[str, TuneReport]:
    """Tuned with either method, long enough for a tiny model."""
    return {
        "blocks": run(place, place / "blocks", method="blocks", epochs=12, learning_rate=5e-3),
        "distill": run(place, place / "distill", epochs=30, learning_rate=5e-3),
    }


def divergence_on_text(place: Path, folder: Path) -> dict[int, float]:
    """KL of every level on the windows that were tuned on."""
    from dropbydrop.data.calibration import load_windows
    from dropbydrop.evaluation.perplexity import evaluate
    from dropbydrop.models.sources import load_tokenizer

    ids = load_windows(place / "text.txt", load_tokenizer(folder), 6, 48, 0).ids[:5]
    original = AutoModelForCausalLM.from_pretrained(place / "llama-tied", dtype=torch.float32)
    views = {str(p): dropbydrop.load(folder, bits=p) for p in LEVELS}
    result = evaluate(views, original.eval(), ids)
    return {p: result["bits"][str(p)]["kl"] for p in LEVELS}


@pytest.mark.parametrize("method", ["blocks", "distill"])
def test_every_level_comes_closer_on_the_text(
    place: Path, made: dict[str, TuneReport], method: str
) -> None:
    before = divergence_on_text(place, place / "llama-tied-q")
    after = divergence_on_text(place, made[method].out)
    for level in LEVELS:
        assert after[level] < before[level]


@pytest.mark.parametrize("method", ["blocks", "distill"])
def test_planes_are_those_of_before(place: Path, made: dict[str, TuneReport], method: str) -> None:
    old, new = files(place / "llama-tied-q"), files(made[method].out)
    planes = {f"plane-{m}.safetensors" for m in (1, 2, 3, 4)}
    assert {n: new[n] for n in planes} == {n: old[n] for n in planes}
    assert new["model.safetensors"] != old["model.safetensors"]
    for name in planes:  # copies, not links
        one, other = place / "llama-tied-q" / name, made[method].out / name
        assert not one.samefile(other)
    assert Checkpoint.open(made[method].out).verify() == []


@pytest.mark.parametrize("method", ["blocks", "distill"])
def test_lower_levels_are_prefixes_of_higher_ones(made: dict[str, TuneReport], method: str) -> None:
    folder, ids = made[method].out, some_ids()
    highest = dropbydrop.load(folder, bits=4)
    with torch.no_grad():
        for level in LEVELS:
            view, alone = dropbydrop.view(highest, level), dropbydrop.load(folder, bits=level)
            assert torch.equal(view(ids).logits, alone(ids).logits)
    checkpoint = Checkpoint.open(folder)
    input_group = checkpoint.quantization.input_groups[0]
    module = input_group.modules[0]
    entries = checkpoint.read_set(input_group.codebooks).entries
    codes = [checkpoint.read_codes(module, m) for m in (1, 2, 3, 4)]
    one = torch.ones(codes[0].shape[0])
    partial = decode(codes[:3], entries[:3], one, 3)
    fourth = torch.nn.functional.embedding(codes[3].int(), entries[3]).flatten(1)
    assert torch.equal(decode(codes, entries, one, 4), partial + fourth)


def test_true_bits_count_the_sets(place: Path, made: dict[str, TuneReport]) -> None:
    old, new = Checkpoint.open(place / "llama-tied-q"), Checkpoint.open(made["distill"].out)
    input_groups = len(new.quantization.input_groups)
    assert new.quantization.sets == tuple(f"input-group-{i}" for i in range(input_groups))
    weights = sum(d_out * d_in for d_out, d_in in new.shapes.values())
    for level in LEVELS:
        extra = 8 * (input_groups - 1) * level * 2 * 8 * 128 / weights
        assert new.true_bits(level) - old.true_bits(level) == pytest.approx(extra)
        size = (made["distill"].out / "model.safetensors").stat().st_size
        size += sum(
            (made["distill"].out / f"plane-{m}.safetensors").stat().st_size
            for m in range(1, level + 1)
        )
        assert new.bytes_at(level) == size


def test_the_report_and_the_folder_say_what_was_done(made: dict[str, TuneReport]) -> None:
    report = made["distill"]
    made_of = Checkpoint.open(report.out).quantization.provenance
    assert made_of["preset"] == "balanced"  # of the quantization
    (done,) = made_of["tuning"]
    assert done["method"] == "distill"
    assert done["loss"] == {str(p): pair for p, pair in report.loss.items()}
    assert done["calibration"]["text"] == "text.txt"
    lines = (report.out / "tune-log.jsonl").read_text().splitlines()
    assert len(lines) == report.steps == json.loads(lines[-1])["step"]
    assert "## Tuned: distill" in (report.out / "README.md").read_text()
    assert report.to_dict()["loss"]["2"][1] < report.to_dict()["loss"]["2"][0]


def test_scales_alone_leave_the_codebooks(place: Path, tmp_path: Path) -> None:
    report = run(place, tmp_path / "scales", train="scales", method="blocks", epochs=1)
    old, new = Checkpoint.open(place / "llama-tied-q"), Checkpoint.open(report.out)
    assert new.quantization.sets == ("universal",)
    for one, other in zip(
        old.read_set("universal").entries, new.read_set("universal").entries, strict=True
    ):
        assert torch.equal(one, other)
    assert new.true_bits(4) == old.true_bits(4)
    changed = [n for n in old.rest if not torch.equal(old.read(n), new.read(n))]
    assert changed
    assert all(n.endswith((".scales", "norm.weight")) for n in changed)


def test_tuning_twice_keeps_both_records(place: Path, tmp_path: Path) -> None:
    first = run(place, tmp_path / "first", method="blocks", epochs=1)
    before = files(first.out)
    second = tune(
        first.out, tmp_path / "second", model=place / "llama-tied", calibration=place / "text.txt",
        epochs=1, **QUICK,
    )  # fmt: skip
    assert files(first.out) == before  # only read
    new = Checkpoint.open(second.out)
    assert [t["method"] for t in new.quantization.provenance["tuning"]] == ["blocks", "distill"]
    lines = [json.loads(s) for s in (second.out / "tune-log.jsonl").read_text().splitlines()]
    assert [line.get("block") for line in lines[:3]] == [0, 1, 2]
    assert lines[3]["step"] == 1


def test_the_checkpoint_is_only_read(place: Path, tmp_path: Path) -> None:
    before = files(place / "llama-tied-q")
    run(place, tmp_path / "out", epochs=1)
    assert files(place / "llama-tied-q") == before


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("method", ["blocks", "distill"])
def test_other_families(place: Path, tmp_path: Path, family: str, method: str) -> None:
    """Biases; 16-bit embeddings; norms around both halves, soft caps, a scaled embedding."""
    report = tune(
        place / f"{family}-q", tmp_path / "out", model=place / family, method=method,
        calibration=place / "text.txt", epochs=1, **QUICK,
    )  # fmt: skip
    assert Checkpoint.open(report.out).verify() == []
    with torch.no_grad():
        assert torch.isfinite(dropbydrop.load(report.out, bits=3)(some_ids()).logits).all()


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["dropbydrop", "tune", place / "llama-tied-q", tmp_path / "out", "--model",
            place / "llama-tied", "--calibration", place / "text.txt", "--windows", 4,
            "--seq-len", 32, "--epochs", 1, "--together", "--json"]  # fmt: skip
    old, sys.argv = sys.argv, [str(a) for a in argv]
    try:
        cli.main()
    finally:
        sys.argv = old
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["bits"]) == {"2", "3", "4"}
    assert result["bits"]["2"]["true_bits"] == Checkpoint.open(tmp_path / "out").true_bits(2)
    assert result["steps"] == 2
    sys.argv = ["dropbydrop", "info", str(tmp_path / "out")]
    try:
        cli.main()
    finally:
        sys.argv = old
    assert "tuned: distill" in capsys.readouterr().out.replace("\n", " ")


# --------------------------------------------------------------------------------- refusals


def refused(place: Path, out: Path, kind: type[DropError], says: str, **changes: Any) -> None:
    with pytest.raises(kind, match=says):
        run(place, out, **changes)
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"method": "magic"}, DropError, "--method 'magic': choose one of distill, blocks"),
        ({"train": "codes"}, DropError, "--train 'codes'"),
        ({"bits": [2, 5]}, PrecisionError, "precision 5 is not a level"),
        ({"windows": 1}, CalibrationError, "sets one apart"),
        ({"windows": 5000}, CalibrationError, "5000 windows"),
        ({"epochs": 0}, DropError, "0 epochs"),
        ({"learning_rate": 2.0}, DropError, "learning rate of 2.0"),
        ({"model": "nothing"}, DropError, "no model 'nothing'"),
        ({"model": None}, DropError, "not at hand .* --model"),
    ],
)
def test_bad_orders(
    place: Path, tmp_path: Path, changes: dict[str, Any], kind: type[DropError], says: str
) -> None:
    refused(place, tmp_path / "out", kind, says, **changes)


def test_other_models_are_refused(place: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "seed", "llama-tied", seed=1)
    refused(place, tmp_path / "out", FormatError, "correlation of", model=tmp_path / "seed")
    save_tiny(tmp_path / "wide", "llama-tied", intermediate_size=96)
    refused(place, tmp_path / "out", FormatError, "intermediate_size", model=tmp_path / "wide")
    save_tiny(tmp_path / "heads", "llama-tied", num_key_value_heads=4)
    says = "made from another model"
    refused(place, tmp_path / "out", FormatError, says, model=tmp_path / "heads")


def test_incomplete_and_damaged_checkpoints_are_refused(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "llama-tied-q", tmp_path / "copy")
    data = bytearray((copy / "plane-2.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "plane-2.safetensors").write_bytes(data)
    settings = {"model": place / "llama-tied", "calibration": place / "text.txt", **QUICK}
    with pytest.raises(FormatError, match=r"plane-2\.safetensors has SHA-256"):
        tune(copy, tmp_path / "out", **settings)
    (copy / "plane-2.safetensors").unlink()
    with pytest.raises(MissingPlaneError, match="plane 2 is needed"):
        tune(copy, tmp_path / "out", **settings)
    with pytest.raises(FormatError, match="no quantization_config"):
        tune(place / "llama-tied", tmp_path / "out", **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_existing_folders_are_not_touched(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DropError, match="exists"):
        run(place, tmp_path / "out")
    with pytest.raises(DropError, match="not a dropbydrop checkpoint"):
        run(place, tmp_path / "out", overwrite=True)
    with pytest.raises(DropError, match="a folder of its own"):
        run(place, place / "llama-tied-q", overwrite=True)
    with pytest.raises(DropError, match="create it first"):
        run(place, tmp_path / "no" / "out")


def test_several_processes_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(place, tmp_path / "out", DropError, "one process")


def test_experts_are_refused_by_name() -> None:
    class Routed:
        model = tiny_model("mixtral")

    with pytest.raises(UnsupportedModelError, match="routes tokens to experts"):
        refuse_experts(Routed())  # type: ignore[arg-type]
