"""The studies on tiny models and with a naive encoder; plots and the page are drawn for real."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.system.errors import FormatError
from dropbydrop_research.study import bound, gaussian
from dropbydrop_research.study.data import (
    GramFolder,
    GroupGram,
    collect,
    linear_modules,
    read_weight,
)
from naive_codes import bit_planes
from tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def grams(model: Path, tmp_path_factory: pytest.TempPathFactory) -> GramFolder:
    g = torch.Generator().manual_seed(0)
    ids, held = torch.randint(5, 300, (2, 6, 64), generator=g)
    folder = tmp_path_factory.mktemp("grams")
    return collect(BlockRunner.open(model), ids, folder, held_ids=held)


# ---- data -------------------------------------------------------------------------------------


def test_collected_statistics_are_those_of_the_inputs(model: Path, grams: GramFolder) -> None:
    """Against a whole-model forward with hooks that share no code with the walk."""
    from transformers import AutoModelForCausalLM

    g = torch.Generator().manual_seed(0)
    ids, held = torch.randint(5, 300, (2, 6, 64), generator=g)
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    groups = list(grams)
    assert len(groups) == len(grams) == 3 * 4
    assert sum(len(group.modules) for group in groups) == 3 * 7
    down = next(s for s in groups if s.name == "model.layers.1.mlp.down_proj")
    seen: list[Tensor] = []
    module = whole.get_submodule("model.layers.1.mlp.down_proj")
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        whole(ids), whole(held)
    assert down.energies is not None
    assert torch.allclose(down.energies, seen[0].square().sum(-1), rtol=1e-4)
    for x, gram in ((seen[0], down.gram), (seen[1], down.held)):
        energy = x.square().sum(-1)
        weights = (down.clip * energy.median(1, keepdim=True).values / energy).clamp(max=1)
        naive = torch.einsum("nti,ntj,nt->ij", x, x, weights) / ids.numel()
        assert gram is not None
        assert torch.allclose(gram, naive, rtol=1e-3, atol=1e-4 * float(naive.abs().max()))
    assert down.tokens == ids.numel()


def _store(folder: Path) -> GramFolder:
    """Two input groups in a cache."""
    store = GramFolder(folder)
    for i in range(2):
        store.write(i, GroupGram(f"g{i}", (f"m{i}",), 9, 20.0, (i + 1) * torch.eye(8), None, None))
    return store


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _flip(folder / "group-00001.safetensors"),
        lambda folder: (folder / "group-00001.safetensors").unlink(),
        lambda folder: (folder / "group-00001.safetensors").write_bytes(b"not safetensors"),
        lambda folder: shutil.copy(
            folder / "group-00000.safetensors", folder / "group-00001.safetensors"
        ),
        lambda folder: save_file({"H": torch.eye(8)}, folder / "group-00001.safetensors"),
        lambda folder: (folder / "files.json").write_text("{"),
        lambda folder: (folder / "files.json").write_text("[]"),
        lambda folder: (folder / "files.json").write_text('{"../x": ""}'),
        lambda folder: (folder / "files.json").write_text('{"\\u0000": ""}'),
    ],
)
def test_damaged_cache_is_refused(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    store = _store(tmp_path)
    assert len(store) == 2
    assert [group.name for group in store] == ["g0", "g1"]
    damage(tmp_path)
    with pytest.raises(FormatError, match="collected anew"):
        list(GramFolder(tmp_path))


def test_collecting_is_all_or_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(5, 69)[None]
    folder = tmp_path / "grams"
    collect(BlockRunner.open(model), ids, folder)
    before = sorted(p.name for p in folder.iterdir())

    def interrupted(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(BlockRunner.open(model), ids, folder, progress=interrupted)
    assert sorted(p.name for p in folder.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["grams"]
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(FormatError, match="other files"):
        collect(BlockRunner.open(model), ids, folder)


def test_modules_and_weights(model: Path) -> None:
    runner = BlockRunner.open(model)
    names = linear_modules(runner)
    assert len(names) == 21
    assert "model.layers.2.mlp.down_proj" in names
    assert not any("head" in name or "embed" in name for name in names)
    stored = load_file(model / "model.safetensors")
    assert torch.equal(read_weight(runner, names[3]), stored[f"{names[3]}.weight"])
    with pytest.raises(FormatError, match="another model"):
        read_weight(runner, "model.layers.7.mlp.down_proj")


# ---- gaussian ---------------------------------------------------------------------------------


def outlier_model(folder: Path) -> Path:
    """One weight of 30 rms, rows of unequal scale in another matrix, and a matrix of zeros."""
    save_tiny(folder, intermediate_size=512)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    w = tensors["model.layers.0.mlp.down_proj.weight"]
    w[3, 5] = 30 * w.square().mean().sqrt()
    tensors["model.layers.1.mlp.up_proj.weight"] *= torch.logspace(-1, 1, 512)[:, None]
    tensors["model.layers.2.self_attn.k_proj.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_gaussian_study(tmp_path: Path, grams: GramFolder) -> None:
    result = gaussian.run(outlier_model(tmp_path), grams=grams)
    json.dumps(result, allow_nan=False)
    assert result["skipped"] == ["model.layers.2.self_attn.k_proj"]
    by_name = {m["module"]: m for m in result["matrices"]}
    assert len(by_name) == 20
    outlier = by_name["model.layers.0.mlp.down_proj"]
    assert outlier["stored"]["max_over_rms"] > 25
    assert outlier["rotated"]["max_over_rms"] < 6  # spread over the inputs
    scaled = by_name["model.layers.1.mlp.up_proj"]
    assert scaled["stored"]["kurtosis"] > 5
    assert scaled["stored_rows"]["kurtosis"] == pytest.approx(3, abs=0.5)
    worst = result["summary"]["stored_rows"]["max_over_rms"]
    assert worst["module"] == "model.layers.0.mlp.down_proj"
    assert len(result["massive_activations"]) == 12
    ratios = [r["max_over_median"] for r in result["massive_activations"]]
    assert ratios == sorted(ratios, reverse=True)
    with pytest.raises(FormatError, match="another model"):
        gaussian.run(tmp_path, modules=["nowhere"])


# ---- bound ------------------------------------------------------------------------------------


def test_bound_of_white_matrices_is_2_to_the_minus_2r(model: Path, tmp_path: Path) -> None:
    """H = I: the bound is 4^-R of the energy; a given error then has its gap in closed form."""
    store = GramFolder(tmp_path)
    modules = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    group = GroupGram("s", modules, 5000, 20.0, torch.eye(48), torch.eye(48), None)
    store.write(0, group)
    errors = {modules[0]: {2: 0.1}}
    seen = []
    result = bound.run(
        model,
        store,
        {1: 1.0, 2: 2.25},
        errors=errors,
        progress=lambda done, total, what: seen.append((done, total)),
    )
    json.dumps(result, allow_nan=False)
    assert seen == [(0, 1), (1, 1)]
    gate, up = result["matrices"]
    for m in (gate, up):
        for level, bits in (("1", 1.0), ("2", 2.25)):
            data = m["levels"][level]
            for key in ("bound", "bound_held_out"):
                assert data[key] == pytest.approx(4.0**-bits, rel=1e-6)
            assert data["bound_optimal"] <= data["bound"]
            assert data["active"] == 48
            assert data["next_bit_db"] == pytest.approx(20 * math.log10(2), rel=1e-6)
    data = gate["levels"]["2"]
    assert data["gap_db"] == pytest.approx(10 * math.log10(0.1 * 4.0**2.25), rel=1e-6)
    assert data["gap_bits"] == pytest.approx(2.25 - 0.5 * math.log2(10), rel=1e-5)
    assert gate["levels"]["1"]["reached"] is None
    assert result["ranking"]["1"] == []
    [row] = result["ranking"]["2"]
    assert row["excess"] == pytest.approx(0.1 - 4.0**-2.25, rel=1e-5)
    assert gate["premises"] == []


def test_bound_study_of_codes(model: Path, grams: GramFolder) -> None:
    """A naive scalar code, reconstructed: errors recomputed under both H, bounds bracket."""
    runner = BlockRunner.open(model)

    def reconstruct(module: str, level: int) -> Tensor:
        w = read_weight(runner, module)
        rms = w.square().mean(1, keepdim=True).sqrt()
        return bit_planes(w / rms, torch.eye(1), list(range(1, level + 1)))[-1] * rms

    result = bound.run(model, grams, {2: 2.3, 3: 3.3}, reconstruct=reconstruct)
    json.dumps(result, allow_nan=False)
    assert len(result["matrices"]) == 21
    for m in result["matrices"]:
        w, two, three = read_weight(runner, m["module"]), m["levels"]["2"], m["levels"]["3"]
        group = next(s for s in grams if s.name == m["input_group"])
        e = w - reconstruct(m["module"], 2)
        naive = torch.einsum("ri,ij,rj->", e, group.gram, e)
        naive /= torch.einsum("ri,ij,rj->", w, group.gram, w)
        assert two["reached"] == pytest.approx(float(naive), rel=1e-3)
        assert two["bound"] < two["reached"]
        assert two["bound"] < two["bound_held_out"]  # 384 tokens for 48 or 80 inputs
        assert two["reached_held_out"] is not None
        assert three["bound"] < two["bound"]
        assert two["gap_db"] > 0
        assert 0 < two["gap_bits"] <= 2.3
        if m["shape"][1] == 80:
            assert "under-sampled" in [p["premise"] for p in m["premises"]]
    ranking = result["ranking"]["3"]
    assert len(ranking) == 21
    assert [r["excess"] for r in ranking] == sorted((r["excess"] for r in ranking), reverse=True)


def test_failed_premises_are_named(tmp_path: Path) -> None:
    model = outlier_model(tmp_path / "model")
    store = GramFolder(tmp_path / "grams")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 512, generator=g)
    w = load_file(model / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    spike = torch.linalg.svd(w).Vh[0]
    store.write(
        0,
        GroupGram(
            "a", ("model.layers.0.mlp.down_proj",), 40, 20.0, x.T @ x / 40, torch.eye(512), None
        ),
    )
    aligned = 0.001 * torch.eye(512) + torch.outer(spike, spike)
    store.write(
        1, GroupGram("b", ("model.layers.2.mlp.down_proj",), 9000, 20.0, aligned, None, None)
    )
    errors = {"model.layers.2.mlp.down_proj": {1: 1e-9}}
    outlier, spiked = bound.run(model, store, {1: 1.0}, errors=errors)["matrices"]
    found = {p["premise"] for p in outlier["premises"]}
    assert {"outliers", "rank-deficient", "under-sampled", "held-out"} <= found
    assert "beaten" in {p["premise"] for p in spiked["premises"]}
    assert spiked["levels"]["1"]["gap_db"] < 0
    assert spiked["energy_ratio"] > 1.5


def test_bound_without_statistics_or_with_those_of_another_model(
    model: Path, grams: GramFolder, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="no cached"):
        bound.run(model, GramFolder(tmp_path), {2: 2.0})
    GramFolder(tmp_path).write(0, GroupGram("s", ("lm_body",), 9, 20.0, torch.eye(8), None, None))
    with pytest.raises(FormatError, match="another model"):
        bound.run(model, GramFolder(tmp_path), {2: 2.0})
    other = save_tiny(tmp_path / "other", seed=1)  # same names and shapes, other weights
    with pytest.raises(FormatError, match="another model"):
        bound.run(other, grams, {2: 2.0})


def test_read_log(tmp_path: Path) -> None:
    log = tmp_path / "quantize-log.jsonl"
    log.write_text(
        '{"event": "start"}\n\n{"module": "a.b", "rel_error": {"2": 0.1, "3": 0.03}, "s": 1.5}\n'
    )
    assert bound.read_log(log) == {"a.b": {2: 0.1, 3: 0.03}}
    for bad in ("{}\n", "not json\n", '{"module": "a", "rel_error": [1]}\n'):
        log.write_text(bad)
        with pytest.raises(FormatError):
            bound.read_log(log)
    with pytest.raises(FormatError, match="not a quantization log"):
        bound.read_log(tmp_path / "absent")


def test_structural_loss_line() -> None:
    assert bound.structural_db(1) == pytest.approx(1.13, abs=0.01)
    assert bound.structural_db(4) == pytest.approx(3.06, abs=0.01)
    assert bound.structural_db(1.5) == pytest.approx(
        (bound.structural_db(1) + bound.structural_db(2)) / 2
    )
    assert bound.structural_db(0.2) == bound.structural_db(1)
    assert bound.structural_db(7) == bound.structural_db(4)
    assert bound.structural_db(3, "nested") > bound.structural_db(3)
    assert bound.structural_db(3, "trellis") < 0.7 * bound.structural_db(3)
