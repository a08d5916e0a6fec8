"""Quantizers to compare with, one file a method, and the registry that `compare` runs.

Each method is a pure function of matrices: weight W [d_out, d_in], Gram matrix H [d_in, d_in] and
levels in, decoded weights with their true bytes out (suite.py). None of them knows about models.

    drop           one nested code, this package        drop.py
    dedicated      the same, one code a level           dedicated.py
    trellis        drop with trellis planes             drop.py
    trellis-dedicated   the same, one code a level      dedicated.py
    paper-weights  drop under the paper's weights       paper_weights.py
    paper          AQLM's loop under the nested loss    paper.py      \\
    aqlm           AQLM, one code a level               aqlm.py        } additive.py
    aqlm-drop      AQLM, codebooks dropped              aqlm_drop.py  /
    gptq           GPTQ, one code a level               gptq.py       \\  columns.py, grid.py
    rtn            round to nearest, one code a level   rtn.py         }
    matryoshka     nested integers                      matryoshka.py /
    any-precision  nested tables, from 3 bits           any_precision.py
    llama-k        llama.cpp's Q2_K, Q3_K_M, Q4_K_M     llama.py      \\
    llama-iq       its IQ2_S, IQ3_S, IQ4_XS             llama.py       } need llama-cpp-python
    llama-k-folded, llama-iq-folded   the same without types that a shape forces   llama.py

None is fine-tuned. Each file says where it departs from its publication.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dropbydrop.quantization.config import MAX_BITS
from dropbydrop.system.errors import DropError
from dropbydrop.system.native_library import built_libraries
from dropbydrop_research.sources import files_of

from . import (
    any_precision,
    aqlm,
    aqlm_drop,
    dedicated,
    drop,
    gptq,
    llama,
    matryoshka,
    paper,
    paper_weights,
    rtn,
)
from .suite import Level, ModelShape, Suite

__all__ = ["METHODS", "Level", "Method", "ModelShape", "Problem", "Suite", "choose"]


@dataclass(frozen=True)
class Problem:
    """What a method is given: the matrices of an input group, and H of their input.

    Attributes:
        weights: module -> float32 [d_out, d_in].
        gram: H = E[x x^T] of the input, float32 [d_in, d_in].
        seed: of whatever the method draws.
        preset: search effort of this package's own methods.
        model: what the matrices are of; None where a test has no model.
    """

    weights: Mapping[str, Tensor]
    gram: Tensor
    seed: int = 0
    preset: str = "balanced"
    model: ModelShape | None = None


Encode = Callable[[Problem, Sequence[int]], dict[str, Suite]]


def _no_bytes(level: int, widths: Collection[int]) -> int:
    return 0


def _no_preparation(levels: Sequence[int]) -> None:
    pass


def _nothing() -> None:
    pass


def _no_files() -> list[Path]:
    return []


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        title: for tables and plots.
        nested: one checkpoint for all levels.
        encode: (problem, levels) -> module -> its suite.
        code: files of this package, relative to it, that the result depends on.
        lowest, highest: the levels that the method has.
        shared: (level, widths of inputs) -> bytes stored once a checkpoint.
        prepare: called with the levels before the first problem; not part of quantizing a model.
        uses_preset: the result depends on the search effort.
        require: raises a DropError that says what to install, where another package is missing.
        binaries: libraries of that package that the result depends on.
    """

    name: str
    title: str
    nested: bool
    encode: Encode
    code: tuple[str, ...]
    lowest: int = 1
    highest: int = MAX_BITS
    shared: Callable[[int, Collection[int]], int] = _no_bytes
    prepare: Callable[[Sequence[int]], None] = _no_preparation
    uses_preset: bool = False
    require: Callable[[], None] = _nothing
    binaries: Callable[[], list[Path]] = _no_files

    def serves(self, levels: Sequence[int]) -> list[int]:
        """Those of `levels` that the method has."""
        return [p for p in levels if self.lowest <= p <= self.highest]

    def sources(self) -> list[Path]:
        """The files of `code`, folders walked, and libraries."""
        found = files_of("baselines/suite.py", *self.code) + self.binaries()
        return found + built_libraries() if "coding" in self.code else found


def _each(one: Callable[..., Suite]) -> Encode:
    """`encode` of a method that takes one matrix and draws nothing."""
    return lambda problem, levels: {
        name: one(w, problem.gram, levels) for name, w in problem.weights.items()
    }


def _seeded(one: Callable[..., Suite]) -> Encode:
    """`encode` of a method that takes one matrix and a seed."""
    return lambda problem, levels: {
        name: one(w, problem.gram, levels, seed=problem.seed) for name, w in problem.weights.items()
    }


def _grouped(method: Callable[..., dict[str, Suite]], **options: str) -> Encode:
    """`encode` of this package's own methods, which take the matrices of a group together."""
    return lambda problem, levels: method(
        problem.weights, problem.gram, levels, problem.preset, problem.seed, **options
    )


def _llama(name: str, title: str, family: str, folded: bool = False) -> Method:
    """A method of llama.py."""

    def encode(problem: Problem, levels: Sequence[int]) -> dict[str, Suite]:
        assert problem.model is not None, "types depend on the model"
        return llama.llama(
            problem.weights, problem.gram, levels, problem.model, family, folded=folded
        )

    levels = llama.MIXTURES[family]
    return Method(
        name, title, False, encode, ("baselines/llama.py",), lowest=min(levels),
        highest=max(levels), require=llama.require, binaries=llama.binaries,
    )  # fmt: skip


_ENCODER = ("baselines/drop.py", "coding", "system/native_library.py")
_AQLM = ("baselines/additive.py", "baselines/aqlm.py", "coding/code.py")
_SCALAR = ("baselines/grid.py", "baselines/columns.py")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("drop", "Drop-by-Drop (nested)", True, _grouped(drop.drop), _ENCODER,
               shared=drop.shared_bytes, prepare=drop.prepare, uses_preset=True),
        Method("dedicated", "ours, dedicated", False, _grouped(dedicated.dedicated),
               (*_ENCODER, "baselines/dedicated.py"), shared=drop.shared_bytes,
               prepare=dedicated.prepare, uses_preset=True),
        Method("trellis", "Drop-by-Drop (nested trellis)", True,
               _grouped(drop.drop, code="trellis"), _ENCODER,
               shared=partial(drop.shared_bytes, code="trellis"), uses_preset=True),
        Method("trellis-dedicated", "ours, trellis, dedicated", False,
               _grouped(dedicated.dedicated, code="trellis"),
               (*_ENCODER, "baselines/dedicated.py"),
               shared=partial(drop.shared_bytes, code="trellis"), uses_preset=True),
        Method("paper-weights", "ours, the paper's weights", True,
               _grouped(paper_weights.paper_weights),
               (*_ENCODER, "baselines/paper_weights.py"), shared=drop.shared_bytes,
               prepare=paper_weights.prepare, uses_preset=True),
        Method("paper", "AQLM, nested loss", True, _seeded(paper.paper),
               (*_AQLM, "baselines/paper.py")),
        Method("aqlm", "AQLM, dedicated", False, _seeded(aqlm.aqlm), _AQLM),
        Method("aqlm-drop", "AQLM (Drop)", True, _seeded(aqlm_drop.aqlm_drop),
               (*_AQLM, "baselines/aqlm_drop.py")),
        Method("gptq", "GPTQ, groups of 64", False, _each(gptq.gptq),
               (*_SCALAR, "baselines/gptq.py")),
        Method("rtn", "round to nearest", False, _each(rtn.rtn),
               ("baselines/grid.py", "baselines/rtn.py")),
        Method("any-precision", "Any-Precision", True, _each(any_precision.any_precision),
               ("baselines/any_precision.py",), lowest=any_precision.LOWEST),
        Method("matryoshka", "nested integers (MatGPTQ)", True, _each(matryoshka.matryoshka),
               (*_SCALAR, "baselines/matryoshka.py")),
        _llama("llama-k", "llama.cpp, K types", "k"),
        _llama("llama-iq", "llama.cpp, IQ types", "iq"),
        _llama("llama-k-folded", "llama.cpp, K types, folded rows", "k", folded=True),
        _llama("llama-iq-folded", "llama.cpp, IQ types, folded rows", "iq", folded=True),
    )
}  # fmt: skip


def choose(names: Sequence[str], levels: Sequence[int]) -> list[Method]:
    """Methods by name, without repeats.

    Raises:
        DropError: an unknown name, a method that has none of the levels, or one that needs a
            package that is not installed.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise DropError(f"--methods {','.join(unknown)}: choose from {', '.join(METHODS)}.")
    chosen = [METHODS[name] for name in dict.fromkeys(names)]
    for method in chosen:
        if not method.serves(levels):
            has = f"starts at {method.lowest} bits"
            if method.highest < MAX_BITS:
                has = f"has {method.lowest} to {method.highest} bits"
            raise DropError(
                f"{method.name} {has} and none of the levels {','.join(map(str, levels))}; ask for "
                "others, or leave the method out."
            )
        method.require()
    return chosen
