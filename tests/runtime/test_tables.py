"""Embedding and head in planes: against a naive decoder, and as part of a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.export import export
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.checkpoint.tables import dense_table
from dropbydrop.coding import tables
from dropbydrop.coding.encoder import Effort
from dropbydrop.data.calibration import Calibration
from dropbydrop.planning.memory import estimate, held_bytes
from dropbydrop.planning.plan import Plan
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError
from dropbydrop.tuning.pipeline import tune
from tiny import VOCAB, save_tiny, tiny_llama, write_checkpoint

BITS = (3, 4, 5)
EMBEDDING = "model.embed_tokens"
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def out(request: Any, tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    """384 rows in five rings of 80, the last one with padding."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tables, "ROWS", 80)
    base = tiny_llama(tie_word_embeddings=request.param)
    folder = tmp_path_factory.mktemp("tables") / "out"
    yield write_checkpoint(folder, base, code=code, embedding_bits=BITS)
    patch.undo()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def planes_at(checkpoint: Checkpoint, level: int) -> int:
    return checkpoint.quantization.table_prefix(checkpoint.quantization.prefix_of(level))


def naive_table(checkpoint: Checkpoint, module: str, bits: int) -> Tensor:
    """W, weight by weight, from the tensors as docs/format.md describes them: float64."""
    spec, books = checkpoint.quantization.embeddings, checkpoint.read_set("tables")
    scales = checkpoint.read(f"{module}.scales").double()
    packed = checkpoint.read(f"{module}.input_scales").tolist()
    vocab, d = len(scales), len(packed)
    length = -(-vocab // (8 * -(-vocab // tables.ROWS))) * 8
    files = {n: f for f in range(1, 5) for n in _names(checkpoint, f)}
    found = torch.zeros(vocab, d, dtype=torch.float64)
    spent = 0
    for k, plane in enumerate(spec.planes, 1):
        if spent == bits:
            break
        spent += plane.bits
        codes = checkpoint.read_plane(files[f"{module}.codes.{k}"], f"{module}.codes.{k}")
        part = books.parts[k - 1]
        value = part[""].double() * part[".scale"].double()
        for row in range(0, vocab, 37):
            ring, r = divmod(row, length)
            for j in range(d):
                label = 0
                for age, tap in enumerate(part[".taps"].tolist()):
                    i = (plane.bits * (r + 1) - 1 - age) % (8 * codes.shape[1])
                    label ^= tap * (int(codes[ring, i // 8, j]) >> i % 8 & 1)
                found[row, j] += value[label]
    turned = found * scales[:, None]
    rotation = tables.Rotation.from_stored(d, torch.tensor(packed, dtype=torch.uint8), None)
    return rotation.transpose(turned)


def _names(checkpoint: Checkpoint, m: int) -> list[str]:
    paths = checkpoint.plane_paths(m) if m <= len(checkpoint.manifest.planes) else ()
    return [n for path in paths for n in checkpoint._file(path.name).header.tensors]


def test_decoding_against_a_naive_decoder(out: Path) -> None:
    checkpoint = Checkpoint.open(out)
    for module in checkpoint.quantization.tables:
        for level, bits in zip((2, 3, 4), BITS, strict=True):
            dense = dense_table(checkpoint, module, planes_at(checkpoint, level))
            rows = slice(0, None, 37)
            naive = naive_table(checkpoint, module, bits)
            torch.testing.assert_close(dense[rows].double(), naive[rows], rtol=1e-5, atol=1e-6)
            count = planes_at(checkpoint, level)
            some = dense_table(checkpoint, module, count, slice(100, 300))
            assert torch.equal(some, dense[100:300])


def test_rows_of_a_model_are_those_of_the_planes(out: Path) -> None:
    """In int8: at most half a step of the largest weight of a row off, before rotating back."""
    checkpoint = Checkpoint.open(out)
    for level in (2, 3, 4):
        model = dropbydrop.load(out, bits=level)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = EMBEDDING if head.tied else "lm_head"
        for module, stored in ((embedding, EMBEDDING), (head, name)):
            rotation = module.source.turns(torch.device("cpu")).forward
            dense = dense_table(checkpoint, stored, planes_at(checkpoint, level))
            exact = rotation.apply_weight(dense)
            held = module.rows.float() * module.row_scales.float()[:, None]
            assert ((held - exact).abs() <= 0.51 * module.row_scales.float()[:, None]).all()
        looked_up = embedding(IDS)
        torch.testing.assert_close(looked_up, embedding.dense_weight()[IDS])
        assert torch.equal(looked_up, embedding.weight[IDS])
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(head(x), x @ head.dense_weight().T, rtol=1e-3, atol=1e-3)
        if head.tied:
            assert head.rows.data_ptr() == embedding.rows.data_ptr()
            torch.testing.assert_close(head.dense_weight(), embedding.dense_weight())


def test_views_are_the_models_of_their_level(out: Path, tmp_path: Path) -> None:
    whole = dropbydrop.load(out)
    before = logits(whole)
    for level in (2, 3):
        small = tmp_path / f"{level}"
        slice_checkpoint(out, small, level)
        alone, view = dropbydrop.load(small, bits=level), dropbydrop.view(whole, level)
        assert torch.equal(logits(view), logits(alone))
        second = dropbydrop.view(whole, level)
        one, two = (m.get_input_embeddings() for m in (view, second))
        assert one.rows.data_ptr() == two.rows.data_ptr()
        with pytest.raises(MissingPlaneError):
            dropbydrop.load(small, bits=4)
    assert torch.equal(logits(whole), before)


def test_planes_arrive(out: Path) -> None:
    model = dropbydrop.load(out, bits=2)
    dropbydrop.load_planes(model, 4)
    assert torch.equal(logits(dropbydrop.view(model, 4)), logits(dropbydrop.load(out)))


def test_rows_are_freed(out: Path) -> None:
    model = dropbydrop.load(out)
    store = model.get_input_embeddings().source.store
    count = len(store._shared)
    view = dropbydrop.view(model, 2)
    assert len(store._shared) == 2 * count
    del view
    assert len(store._shared) == count


def test_bytes(out: Path) -> None:
    """What a level reads, and what it takes."""
    checkpoint = Checkpoint.open(out)
    for level, bits in zip((2, 3, 4), BITS, strict=True):
        values = 64 * 5 * 80 * len(checkpoint.quantization.tables)  # with padding
        prefix = checkpoint.quantization.prefix_of(level)
        mine = sum(tables_in(checkpoint, m) for m in range(1, prefix + 1))
        assert mine == values * bits // 8
        plan = Plan.uniform(checkpoint, level)
        assert plan.bytes_read(checkpoint) == checkpoint.bytes_at(level)
        memory = estimate(checkpoint, plan.planes_by_module(checkpoint))
        held = held_bytes(dropbydrop.load(out, bits=level))
        assert memory.weights - memory.shared == held


def tables_in(checkpoint: Checkpoint, m: int) -> int:
    """Bytes of tables in plane file m, by its header."""
    headers = (checkpoint._file(path.name).header for path in checkpoint.plane_paths(m))
    found = {n: info for header in headers for n, info in header.tensors.items()}
    modules = checkpoint.quantization.tables
    return sum(i.nbytes for n, i in found.items() if n.rpartition(".codes.")[0] in modules)


def test_a_plan_gives_tables_the_level_below_its_average(out: Path) -> None:
    checkpoint = Checkpoint.open(out)
    names = [group.name for group in checkpoint.quantization.input_groups]
    plan = Plan(checkpoint.fingerprint, dict.fromkeys(names, 2) | {names[0]: 4, names[1]: 4})
    assert 2 < plan.average_bits(checkpoint) < 3
    model, two = dropbydrop.load(out, plan=plan), dropbydrop.load(out, bits=2)
    one, other = (m.get_input_embeddings().rows for m in (model, two))
    assert torch.equal(one, other)
    assert plan.bytes_read(checkpoint) < checkpoint.bytes_at(4)


def test_export_and_dequantize(out: Path, tmp_path: Path) -> None:
    export(out, tmp_path / "dense", 3, dtype="float32", progress=False)
    ours = dropbydrop.load(out, bits=3)
    checkpoint = Checkpoint.open(out)
    dense = dense_table(checkpoint, EMBEDDING, planes_at(checkpoint, 3))
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(plain.get_input_embeddings().weight, dense)
    expected = logits(ours)
    ours.dequantize()
    torch.testing.assert_close(logits(ours), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["plane-1.safetensors", "model.safetensors"])
def test_damage_is_found(out: Path, tmp_path: Path, name: str) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(out, copied)
    raw = bytearray((copied / name).read_bytes())
    raw[-9] ^= 1
    (copied / name).write_bytes(raw)
    with pytest.raises(FormatError):
        dropbydrop.load(copied, bits=2)


# ------------------------------------------------------------------------------- encoding


def test_bits_of_levels() -> None:
    assert tables.table_bits((2, 3, 4), 5) == (4, 5, 5)
    assert tables.table_bits((2, 3, 4), 4) == (4, 4, 4)
    assert tables.table_bits((1, 2, 8), 5) == (3, 4, 5)
    for vocab in (1, 8, 4096, 4097, 49152, 128256, 151936, 262144):
        count, length = tables.rings(vocab)
        assert length % 8 == 0
        assert length <= tables.ROWS
        assert 0 <= count * length - vocab < 8 * count


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_quantize(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding and head come back as close as their bits allow, scaled embeddings too."""
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    save_tiny(tmp_path / "model", family)
    windows = Calibration(torch.randint(3, 300, (3, 32)), {})
    made = {"calibration": windows, "head_bits": 5, "progress": False}
    report = pipeline.quantize(tmp_path / "model", tmp_path / "out", **made)
    kept = {entry["name"]: entry for entry in report.kept}
    assert kept[EMBEDDING]["bits"] == [4, 5, 5]
    errors = kept[EMBEDDING]["rel_error"]
    assert 0.02 > errors["2"] > 2 * errors["3"] > 0
    checkpoint = Checkpoint.open(report.out)
    assert checkpoint.verify() == []
    original = original_of(tmp_path / "model")
    weight = original.get_input_embeddings().weight
    dense = dense_table(checkpoint, EMBEDDING, planes_at(checkpoint, 2))
    assert ((dense - weight).square().sum() / weight.square().sum()) < 0.03
    model = dropbydrop.load(report.out, bits=2)
    torch.testing.assert_close(
        model.get_input_embeddings()(IDS), original.get_input_embeddings()(IDS), rtol=0, atol=2.0
    )


def test_tuning_leaves_tables_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    save_tiny(tmp_path / "model", "llama-tied", num_hidden_layers=1)
    windows = Calibration(torch.randint(3, 300, (3, 32)), {})
    made = {"calibration": windows, "head_bits": 5, "progress": False}
    out = pipeline.quantize(tmp_path / "model", tmp_path / "out", **made).out
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(i * 7919 % 1000) for i in range(600)))
    asked = {"model": tmp_path / "model", "calibration": text, "windows": 2, "seq_len": 32}
    tune(out, tmp_path / "tuned", **asked, device="cpu", progress=False)
    before, after = Checkpoint.open(out), Checkpoint.open(tmp_path / "tuned")
    assert after.verify() == []
    for level in (2, 3, 4):
        count = planes_at(before, level)
        one, two = (dense_table(c, EMBEDDING, count) for c in (before, after))
        assert torch.equal(one, two)
    dropbydrop.load(after.path, bits=2)


def original_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_resumed_after_the_last_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    save_tiny(tmp_path / "model", "llama-tied", num_hidden_layers=1)
    windows = Calibration(torch.randint(3, 300, (3, 32)), {})
    made = {"calibration": windows, "head_bits": 4, "progress": False}
    plain = pipeline.quantize(tmp_path / "model", tmp_path / "plain", **made).out
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise DropError("stop")

        broken.setattr(pipeline, "_finish", fail)
        with pytest.raises(DropError, match="stop"):
            pipeline.quantize(tmp_path / "model", tmp_path / "out", resume=True, **made)
    report = pipeline.quantize(tmp_path / "model", tmp_path / "out", resume=True, **made)
    assert report.resumed == 1
    for file in plain.iterdir():
        assert file.read_bytes() == (report.out / file.name).read_bytes(), file.name
