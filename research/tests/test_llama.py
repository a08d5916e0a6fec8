"""The llama.cpp methods: types, bytes, folding; with llama.cpp itself where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dropbydrop.system.errors import DropError, UnsupportedModelError
from dropbydrop_research.baselines import METHODS, Problem, choose, llama
from dropbydrop_research.baselines.suite import ModelShape
from problems import error, matrix_and_gram

gguf = pytest.importorskip("gguf")

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")


def shape_of(d_in: int, down: int = 256, blocks: int = 2, family: str = "llama") -> ModelShape:
    """A model whose matrices have 64 outputs, and `down` inputs of the last one of a block."""
    modules = [
        (f"model.layers.{i}.{name}", (64, d_in)) for i in range(blocks) for name in NAMES
    ] + [(f"model.layers.{i}.mlp.down_proj", (64, down)) for i in range(blocks)]
    return ModelShape(family, blocks, "model.layers", 4, 2, tuple(modules))


class FakeLibrary:
    """Two types: of 256 inputs a block (as Q8_0, which gguf can encode), else of 32."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], np.ndarray[Any, Any]]] = []

    def types(self, rows: Mapping[str, int], model: ModelShape, mixture: str) -> dict[str, str]:
        return {name: "Q4_1" if width % 256 else "Q8_0" for name, width in rows.items()}

    def quantize(self, rows: Any, kind: str, importance: Any) -> Any:
        self.seen.append((rows.shape, importance))
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    library = FakeLibrary()
    monkeypatch.setattr(llama, "library", lambda: library)
    llama.types_of.cache_clear()
    yield library
    llama.types_of.cache_clear()


def test_fall_backs_are_told_and_folding_avoids_them(fake: FakeLibrary) -> None:
    weight, h = matrix_and_gram(64, 96)
    name = "model.layers.0.self_attn.q_proj"
    plain = llama.llama({name: weight}, h, [2, 4], shape_of(96), "k")[name]
    folded = llama.llama({name: weight}, h, [2, 4], shape_of(96), "k", folded=True)[name]
    assert [plain.levels[p].kind for p in (2, 4)] == ["Q4_1 for Q8_0"] * 2
    assert folded.levels[2].kind == "Q8_0"
    assert plain.levels[2].true_bits == 5.0  # 32 codes of 4 bits, two numbers of 16
    assert folded.levels[2].true_bits == 8.5
    assert len(plain.files) == 2
    for suite in (plain, folded):  # rows come back where they were
        assert suite.levels[4].weight.shape == weight.shape
        assert error(weight, suite.levels[4].weight, h) < 0.02
    (one, importance), (many, repeated) = fake.seen[0], fake.seen[-1]
    assert one == (64, 96)
    assert many == (8, 768)
    assert np.allclose(importance, h.diagonal())
    assert np.allclose(repeated.reshape(8, 96), importance)


def test_rows_that_cannot_be_folded_stay(fake: FakeLibrary) -> None:
    assert [llama.folds(s) for s in ((64, 96), (576, 576), (9, 1536), (7, 576))] == [8, 4, 1, 1]
    model = ModelShape("llama", 1, "x", 1, 1, (("x.0.mlp.up_proj", (7, 96)),))
    found = llama.types_of(model, "Q2_K", "folded")
    assert found == {"x.0.mlp.up_proj": "Q4_1"}


def test_names_without_a_place_in_a_file_are_refused(fake: FakeLibrary) -> None:
    model = ModelShape("llama", 1, "model.layers", 1, 1, (("model.layers.0.mixer.x", (8, 32)),))
    with pytest.raises(UnsupportedModelError, match=r"no name for model.layers.0.mixer.x"):
        llama.types_of(model, "Q2_K", "stored")


def test_without_llama_cpp_the_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = llama.importlib.util.find_spec
    for missing, says in (("gguf", "pip install 'gguf"), ("llama_cpp", "llama-cpp-python==")):
        monkeypatch.setattr(
            llama.importlib.util,
            "find_spec",
            lambda name, gone=missing: None if name == gone else real(name),
        )
        with pytest.raises(DropError, match=says):
            choose(["rtn", "llama-k"], [2])
    assert llama.binaries() == []
    with pytest.raises(DropError, match=r"llama-iq has 2 to 4 bits and none of the levels 5"):
        choose(["llama-iq"], [5])


# ---- with llama.cpp ------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", ["Q2_K", "Q4_K_M", "IQ2_S", "IQ3_S"])
def test_bytes_are_those_of_a_file_that_llama_cpp_writes(mixture: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    llama.types_of.cache_clear()
    model = shape_of(96)
    types, library = llama.types_of(model, mixture, "stored"), llama.library()
    assert set(types.values()) & {"Q4_0", "Q5_0", "IQ4_NL"}  # 96 inputs
    names = llama._gguf_names(model)
    random = np.random.default_rng(0)
    rows = {m: random.standard_normal(shape, dtype=np.float32) for m, shape in model.modules}
    weights = {m: random.random(d, dtype=np.float32) + 0.1 for m, (_, d) in model.modules}
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    llama.write_file(source, {names[m]: w for m, w in rows.items()}, model)
    library.quantize_file(source, target, mixture, {names[m]: w for m, w in weights.items()})
    written = {t.name: t for t in gguf.GGUFReader(str(target)).tensors}
    for module, kind in types.items():
        tensor = written[names[module]]
        assert tensor.tensor_type.name == kind
        assert np.array_equal(library.quantize(rows[module], kind, weights[module]), tensor.data)


def test_more_bits_and_importance_help() -> None:
    pytest.importorskip("llama_cpp")
    llama.types_of.cache_clear()
    weight, h = matrix_and_gram(64, 96)
    name, model = "model.layers.0.self_attn.q_proj", shape_of(96)
    for method in ("llama-k-folded", "llama-iq-folded"):
        problem = Problem({name: weight}, h, model=model)
        suite = METHODS[method].encode(problem, [2, 3, 4])[name]
        errors = [error(weight, suite.levels[p].weight, h) for p in (2, 3, 4)]
        assert errors == sorted(errors, reverse=True)
        flat = Problem({name: weight}, torch.eye(96), model=model)
        plain = METHODS[method].encode(flat, [2])[name].levels[2].weight
        assert errors[0] < error(weight, plain, h)
    assert {path.name.split(".")[0] for path in llama.binaries()} == {"libggml-base", "libllama"}
