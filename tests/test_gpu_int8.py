"""The CUDA kernel "cuda-i8" without a GPU: its own source, compiled for the host, against numpy.

int8.cu is built with the C++ compiler over tests/cuda_on_cpu.h, which runs CUDA threads as
fibers.
The reference below states the arithmetic of int8.py: integer sums are compared through results that
differ by float32 rounding only; roundings to bytes must agree exactly. Where NVRTC is installed the
source is also compiled for real devices. What runs on a GPU is in test_kernels.py.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dropbydrop.errors import KernelError
from dropbydrop.kernels.gpu import device_tables, int8, nvrtc
from dropbydrop.universal import universal_set

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
GLUE = """
#include "cuda_on_cpu.h"
#include "int8.cu"
extern "C" void host_round(const float *x, signed char *steps, float *units, int n, int d,
                           int blocks) {
  run(n * blocks, 1, 32, [&] { round_rows(x, steps, units, n, d, blocks); });
}
extern "C" void host_product(Planes planes, const uint2 *books, const float *book_units,
                             const uint4 *steps, const float *units, const void *scales,
                             const void *bias, void *out, int scale_type, int bias_type,
                             int out_type, int n, int d_out, int groups, int grid) {
  run(grid, (n + N - 1) / N, THREADS, [&] {
    product(planes, books, book_units, steps, units, scales, bias, out, scale_type, bias_type,
            out_type, n, d_out, groups);
  });
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(plan) -> the library of int8.cu compiled with the constants of a plan."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("int8")
    (folder / "glue.cpp").write_text(GLUE)
    built = {}

    def library(plan: int8.Plan) -> ctypes.CDLL:
        if plan not in built:
            out = folder / f"int8-{len(built)}.so"
            defines = plan.defines() | {"THREADS": 64}
            subprocess.run(
                [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
                + [f"-I{HERE}", f"-I{Path(int8.__file__).parent}", "-w"]
                + [f"-D{key}={value}" for key, value in defines.items()]
                + [str(folder / "glue.cpp"), "-o", str(out)],
                check=True,
            )
            built[plan] = ctypes.CDLL(str(out))
        return built[plan]

    return library


def rounded(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Inputs as bytes: int8 [n, blocks, 128] and their units float32 [n, blocks]."""
    n, d = x.shape
    blocks = -(-d // 128)
    whole = np.zeros((n, blocks * 128), np.float32)
    whole[:, :d] = x.numpy()
    whole = whole.reshape(n, blocks, 128)
    largest = np.abs(whole).max(2)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    steps = np.rint(whole * inverse[..., None]).astype(np.int8)
    return steps, largest / np.float32(127)


def reference(
    x: Tensor, codes: list[Tensor], tables: Tensor, scales: Tensor, bias: Tensor
) -> np.ndarray:
    """[n, d_out] by the integer arithmetic of the kernel, its float32 part in float64."""
    steps, units = rounded(x)
    n, blocks = units.shape
    books, book_units = int8.prepare(tables)
    d_out, groups = codes[0].shape
    total = np.zeros((n, d_out))
    for m, plane in enumerate(codes):
        entries = np.zeros((d_out, blocks * 16, 8), np.int64)
        entries[:, :groups] = books[m].numpy().astype(np.int64)[plane.numpy()]
        entries = entries.reshape(d_out, blocks, 128)
        dots = np.einsum("nbk,rbk->nrb", steps.astype(np.int64), entries)  # exact
        assert np.abs(dots).max() < 2**24  # so float32 holds them
        total += float(book_units[m]) * np.einsum("nrb,nb->nr", dots, units.astype(np.float64))
    return total * scales.double().numpy() + bias.double().numpy()


def random_case(n: int, d_out: int, groups: int, prefix: int):
    gen = torch.Generator().manual_seed(1000 * d_out + groups + prefix)
    x = torch.randn(n, 8 * groups, generator=gen)
    codes = [
        torch.randint(0, 256, (d_out, groups), generator=gen, dtype=torch.uint8)
        for _ in range(prefix)
    ]
    tables = torch.stack([torch.randn(256, 8, generator=gen) * 0.5**m for m in range(prefix)])
    scales = torch.rand(d_out, generator=gen) + 0.5
    return x, codes, tables, scales, torch.randn(d_out, generator=gen)


def on_host(library, x, codes, tables, scales, bias, dtype, grid: int) -> Tensor:
    """The kernels of int8.cu as compiled into `library`."""
    n, d = x.shape
    blocks = -(-d // 128)
    steps = torch.full((n, blocks * 128), 99, dtype=torch.int8)
    units = torch.full((n, blocks), -1.0)
    library.host_round(*[ctypes.c_void_p(t.data_ptr()) for t in (x, steps, units)], n, d, blocks)
    books, book_units = int8.prepare(tables)
    out = torch.full((n, codes[0].shape[0]), 7.0, dtype=dtype)
    arguments = int8.arguments(steps, units, codes, books, book_units, scales, bias, out)
    library.host_product(*arguments, grid)
    want, want_units = rounded(x)
    assert np.array_equal(steps.view(n, blocks, 128).numpy(), want)
    assert np.array_equal(units.numpy(), want_units)
    return out


# n, d_out, groups, P: every way to load codes, teams of 1 to 32 lanes, odd rows and tails
SHAPES = [
    (1, 37, 72, 2),
    (3, 5, 9, 1),
    (5, 33, 16, 4),
    (2, 130, 528, 3),
    (1, 7, 130, 8),
    (16, 20, 48, 2),
]


@pytest.mark.parametrize(("n", "d_out", "groups", "prefix"), SHAPES)
def test_the_source_equals_the_reference(build, n, d_out, groups, prefix):
    case = random_case(n, d_out, groups, prefix)
    library = build(int8.plan(n, d_out, groups, prefix))
    want = reference(*case)
    got = on_host(library, *case, torch.float32, grid=2)
    assert np.abs(got.numpy() - want).max() < 2e-6 * np.abs(want).max()
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        x, codes, tables, scales, bias = case
        rough = (x, codes, tables, scales.half(), bias.to(dtype))
        got = on_host(library, *rough, dtype, grid=1).double().numpy()
        exact = reference(*rough)
        assert (np.abs(got - exact) <= step * np.abs(exact) + 1e-5).all()


def test_a_row_does_not_depend_on_company(build):
    x, *rest = random_case(16, 40, 96, 2)
    together = on_host(build(int8.plan(16, 40, 96, 2)), x, *rest, torch.float32, grid=1)
    for n in (1, 2, 3, 7):
        got = on_host(build(int8.plan(n, 40, 96, 2)), x[:n], *rest, torch.float32, grid=2)
        assert torch.equal(got, together[:n])


def test_nan_and_infinity_reach_the_result(build):
    x = random_case(2, 5, 32, 2)[0]
    for bad in (float("nan"), float("inf")):
        x[1, 200] = bad
        library = build(int8.plan(2, 5, 32, 2))
        steps = torch.zeros(2, 256, dtype=torch.int8)
        units = torch.zeros(2, 2)
        library.host_round(*[ctypes.c_void_p(t.data_ptr()) for t in (x, steps, units)], 2, 256, 2)
        assert units.isnan().tolist() == [[False, False], [False, True]]
        assert not units[0].isinf().any()


def test_the_error_is_what_the_note_says():
    """Of both roundings together, on the set that ships and Gaussian inputs: about 1 %."""
    tables = universal_set((2, 3, 4))
    tables = device_tables(torch.cat([tables, -tables], 1), "cpu")
    gen = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 256, (200, 128), generator=gen, dtype=torch.uint8) for _ in range(4)]
    x = torch.randn(4, 1024, generator=gen)
    for prefix in (1, 2, 4):
        weight = sum(tables[m].double()[codes[m].long()] for m in range(prefix)).view(200, -1)
        exact = x.double().numpy() @ weight.numpy().T
        got = reference(x, codes[:prefix], tables[:prefix], torch.ones(200), torch.zeros(200))
        assert 0.004 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.015


def test_plans_fit_and_depend_on_the_shape():
    for groups in (9, 72, 512, 1376, 3584):
        for prefix in range(1, 9):
            plans = [int8.plan(n, 4096, groups, prefix) for n in range(1, 17)]
            assert all(p.shared(-(-groups // 16)) <= int8._SHARED for p in plans)
            assert len({p.LANES for p in plans}) == 1
    assert int8.plan(1, 8192, 3584, 2).COPIES == 16
    with pytest.raises(KernelError, match=r"do not fit into .* triton"):
        int8.check_fits(1 << 21, 4)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
    with pytest.raises(KernelError, match="NVRTC library"):
        nvrtc.compile_source("", "empty", {}, "sm_90")


@pytest.mark.skipif(bool(nvrtc.missing()), reason=f"cannot compile: {nvrtc.missing()}")
@pytest.mark.parametrize("architecture", ["compute_80", "sm_90"])
def test_compiles_for_devices(architecture):
    for n, d_out, groups, prefix in (*SHAPES, (1, 8192, 3584, 4)):
        defines = int8.plan(n, d_out, groups, prefix).defines()
        image = nvrtc.compile_source(int8.SOURCE, "int8", defines, architecture)
        assert b"product" in image
        assert b"round_rows" in image
    with pytest.raises(KernelError, match="does not compile for"):
        nvrtc.compile_source("nonsense", "int8", {}, architecture)
