"""Theorem 1 as an experiment, and plots and the page of all studies, which are drawn for real."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.codebooks import default_lambdas, train
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.system.errors import DropError
from dropbydrop_research.study import bound, bound_plots, encode, gaussian, paper, refinement, style
from dropbydrop_research.study.data import collect
from dropbydrop_research.theory import Case
from naive_codes import bit_planes
from tiny import save_tiny


@pytest.fixture(scope="module")
def refined() -> dict:
    return refinement.run(bit_planes, levels=(2, 3, 4), d_in=24, d_out=400)


def test_refinement_in_three_cases(refined: dict) -> None:
    json.dumps(refined, allow_nan=False)
    assert [c["case"] for c in refined["cases"]] == ["square", "wide", "deficient"]
    assert [tuple(c["shape"]) for c in refined["cases"]] == [(24, 24), (24, 96), (24, 12)]
    for case in refined["cases"]:
        assert case["rank"] == min(case["shape"])
        for on_w, on_y in case["equivalence"]:
            assert on_y == pytest.approx(on_w, rel=1e-6)
        codes, bounds = case["codes"], case["bound"]
        for value, least in zip(codes["ideal"], bounds, strict=True):
            assert value == pytest.approx(least, rel=0.06)  # 400 rows
        assert codes["single"][0] is None  # level 1 was not asked for
        assert codes["dropped"][-1] == codes["single"][-1]
        for i in (1, 2, 3):
            assert codes["nested"][i] > bounds[i]
            assert case["gaps"]["nested"][i]["db"] > 0
        assert codes["dropped"][1] > 1.5 * codes["nested"][1]  # what supervision is for
        levels = case["components"]["levels"]
        assert [level["bits"] for level in levels] == [0.25, 0.5, 1, 2, 3, 4]
        assert sum(sum(v["increments"]) for v in levels) == pytest.approx(4 * 24)
        assert "nested" not in levels[0]
        for level in levels[2:]:
            total = sum(level["nested"]) / sum(case["components"]["spectrum"])
            assert total == pytest.approx(codes["nested"][int(level["bits"]) - 1], rel=1e-6)


def test_overhead_counts_as_rate() -> None:
    cases = [Case.WIDE]
    bare = refinement.run(bit_planes, levels=(2,), d_in=16, d_out=20, cases=cases)
    paid = refinement.run(bit_planes, levels=(2,), d_in=16, d_out=20, cases=cases, overhead=0.5)
    assert paid["cases"][0]["bits"] == [1.5, 2.5]
    assert paid["cases"][0]["bound"][1] < bare["cases"][0]["bound"][1]
    assert paid["cases"][0]["codes"]["nested"] == bare["cases"][0]["codes"]["nested"]


def test_a_code_that_does_not_refine_is_an_error() -> None:
    def stuck(weight: Tensor, h: Tensor, levels: Sequence[int]) -> list[Tensor]:
        return [torch.zeros_like(weight)] * levels[-1]

    with pytest.raises(DropError, match="does not fall"):
        refinement.run(stuck, levels=(1, 2), d_in=8, d_out=8)
    with pytest.raises(ValueError, match="increase"):
        refinement.run(bit_planes, levels=(2, 2), d_in=8, d_out=8)


def test_package_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real quantizer: prefixes in the original space, the nested one better when dropped."""
    sets = {}

    def small(levels: tuple[int, ...]) -> BytesSet:
        if levels not in sets:
            quick = train(levels, default_lambdas(levels), samples=4096, rounds=3, beam=2)
            sets[levels] = BytesSet.of(quick)
        return sets[levels]

    monkeypatch.setattr(encode, "universal_set", small)
    result = refinement.run(
        encode.package_encoder("fast"),
        levels=(1, 2),
        d_in=48,
        d_out=64,
        overhead=encode.overhead(48),
        cases=[Case.WIDE],
    )
    [case] = result["cases"]
    assert case["bits"] == pytest.approx([1 + 1 / 3, 2 + 1 / 3])
    assert case["codes"]["single"][0] < case["codes"]["nested"][0] < case["codes"]["dropped"][0]
    assert all(gap["db"] > 0 for gap in case["gaps"]["nested"])


# ---- plots and the page -----------------------------------------------------------------------


def test_palette_tells_series_apart_without_colour() -> None:
    keys = [(s["marker"], str(s["linestyle"])) for s in style.SERIES]
    assert len(set(keys)) == len({s["color"] for s in style.SERIES}) == len(style.SERIES)


def test_missing_matplotlib_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DropError, match=r"pip install matplotlib"):
        paper.plot_cost([])


def test_page_with_every_figure(refined: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = save_tiny(tmp_path / "model")
    g = torch.Generator().manual_seed(0)
    ids, held = torch.randint(5, 300, (2, 3, 32), generator=g)
    grams = collect(BlockRunner.open(model), ids, tmp_path / "grams", held)
    fit = gaussian.run(model)
    errors = {m["module"]: {2: 0.2, 3: 0.05} for m in fit["matrices"]}
    fit["matrices"] = fit["matrices"][:3]  # drawing panels is what takes time
    limits = bound.run(model, grams, {2: 2.1, 3: 3.1}, errors=errors)
    rows = [
        {"method": "full precision", "bits": None, "ppl": 20.7, "accuracy": 0.5},
        *(
            {"method": m, "bits": b, "ppl": 30 - b, "accuracy": 0.4 + b / 50, "stderr": 0.01}
            for m in ("nested", "dedicated <b>")
            for b in (2, 3)
        ),
    ]
    cost = [{"method": "nested", "seconds": 90.0, "bytes": 6e7}]
    results = {
        "gaussian": fit,
        "bound": limits,
        "refinement": refined | {"cases": refined["cases"][2:]},
        "perplexity": rows,
        "accuracy": rows,
        "cost": cost,
    }
    report = paper.run(results, tmp_path / "page")
    assert report["missing"] == {}
    page = Path(report["page"]).read_text()
    assert set(report["data"]) == set(results)
    assert page.count("<img ") == len(report["figures"]) == 11
    assert "http" not in page.split("</style>")[1].replace("http-equiv", "")
    for paths in report["figures"].values():
        assert [Path(p).suffix for p in paths] == [".png", ".svg"]
        assert all(Path(p).stat().st_size > 20 for p in paths)
    assert json.loads((tmp_path / "page" / "cost.json").read_text()) == cost
    assert style.save(bound_plots.plot_matrices(limits, "2"), tmp_path / "m")[0].is_file()


def test_page_with_some_figures_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = paper.run({"cost": [{"method": "a", "seconds": 1.0, "bytes": 1}]}, tmp_path)
    assert set(report["figures"]) == {"8"}
    assert report["missing"]["6"] == "dropbydrop eval"
    assert report["missing"]["12"] == "dropbydrop study refinement"
    assert "Not measured here" in Path(report["page"]).read_text()
    with pytest.raises(ValueError, match="no figure"):
        paper.run({"nonsense": 1}, tmp_path)


def test_svg_is_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"method": "a", "bits": b, "ppl": 20.0 + b} for b in (2, 3)]
    one, two = (style.save(paper.plot_perplexity(rows), tmp_path / n)[1] for n in "ab")
    assert one.read_bytes() == two.read_bytes()
