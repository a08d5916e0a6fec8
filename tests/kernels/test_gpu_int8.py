"""The CUDA kernel "cuda-i8" without a GPU: its own source, compiled for the host, against numpy.

int8.cu is built with the C++ compiler over tests/cuda_on_cpu.h, which runs CUDA threads as
fibers.
The reference below states the arithmetic of int8.py: integer sums are compared through results that
differ by float32 rounding only; roundings to bytes must agree exactly. Where NVRTC is installed the
source is also compiled for real devices. What runs on a GPU is in test_kernels.py.
"""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_on_cpu import check_resources, compiled
from torch import Tensor

from dropbydrop.coding.code import decode
from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.codebooks import universal_set
from dropbydrop.coding.planes import BytesPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import Matrix, Plane, prepare_codebooks, registry
from dropbydrop.kernels.cuda import CudaGroup, dense, device_entries, int8, nvrtc
from dropbydrop.system.errors import KernelError

GLUE = """
#include "cuda_on_cpu.h"
#include "numbers.cu"
#include "rotate.cu"
#include "int8.cu"
extern "C" void host_rotate(const void *x, const float *signs, const float *factor,
                            signed char *steps, float *units, int type, int d, int odd, int size,
                            int span, int blocks, int grid, int rows, int threads) {
  run(grid, rows, threads, [&] {
    rotate_rows(x, signs, factor, steps, units, type, d, odd, size, span, blocks);
  });
}
extern "C" void host_product(Matrices all, const uint2 *books, const float *book_units,
                             const uint4 *steps, const float *units, const float *scales,
                             const float *bias, void *out, int type, int n, int groups, int grid) {
  run(grid, (n + N - 1) / N, THREADS, [&] {
    product(all, books, book_units, steps, units, scales, bias, out, type, n, groups);
  });
}
"""


DENSE = """
#include "cuda_on_cpu.h"
#include "numbers.cu"
#include "dense.cu"
extern "C" void host_decode(Planes planes, const uint4 *books, const void *scales, void *out,
                            int scale_type, int type, int rows, int groups, int grid) {
  run(grid, 1, THREADS, [&] {
    decode(planes, books, scales, out, scale_type, type, rows, groups);
  });
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(plan) -> the library of int8.cu compiled with the constants of a plan."""
    folder, built = tmp_path_factory.mktemp("int8"), {}

    def library(plan: int8.Plan) -> ctypes.CDLL:
        if plan not in built:
            defines = plan.defines() | {"THREADS": 64}
            built[plan] = compiled(folder, GLUE, f"int8-{len(built)}", defines)
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


def rotate_on_host(library, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`rotate_rows` of int8.cu as compiled into `library`; poisoned before."""
    n, d = x.shape
    blocks = -(-d // 128)
    steps = torch.full((n, blocks * 128), 99, dtype=torch.int8)
    units = torch.full((n, blocks), -1.0)
    _, grid, threads = int8.spans(rotation)
    library.host_rotate(*int8.rotate_arguments(x, rotation, steps, units), grid, n, threads)
    return steps, units


def on_host(library, x, matrices, tables, scales, bias, dtype, grid: int) -> Tensor:
    """The kernels of int8.cu as compiled into `library`; x is taken as rotated already."""
    steps, units = rotate_on_host(library, x, Rotation(x.shape[1], 1, torch.ones(x.shape[1]), None))
    want, want_units = rounded(x)
    assert np.array_equal(steps.view(want.shape).numpy(), want)
    assert np.array_equal(units.numpy(), want_units)
    books, book_units = int8.prepare(tables)
    out = torch.full((x.shape[0], len(scales)), 7.0, dtype=dtype)
    arguments = int8.product_arguments(steps, units, matrices, books, book_units, scales, bias, out)
    library.host_product(*arguments, grid)
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


LARGE = [(1, 8192, 3584, 4), (1, 4096, 512, 2), (16, 4096, 512, 4), (16, 4096, 1376, 8)]


@pytest.mark.parametrize(("n", "d_out", "groups", "prefix"), SHAPES)
def test_the_source_equals_the_reference(build, n, d_out, groups, prefix):
    x, codes, *rest = random_case(n, d_out, groups, prefix)
    library = build(int8.plan(n, d_out, groups, prefix))
    want = reference(x, codes, *rest)
    got = on_host(library, x, [codes], *rest, torch.float32, grid=2)
    assert np.abs(got.numpy() - want).max() < 2e-6 * np.abs(want).max()
    for dtype, step in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        got = on_host(library, x, [codes], *rest, dtype, grid=1).double().numpy()
        assert (np.abs(got - want) <= step * np.abs(want) + 1e-5).all()


@pytest.mark.parametrize("rows", [(5, 1), (33, 8, 70), (2, 64, 3, 9)])
def test_matrices_of_a_site_in_one_launch(build, rows):
    """The same bits as one launch for each; teams and blocks end where they may."""
    for groups, prefix in ((48, 2), (9, 1)):
        x, _, tables, *_ = random_case(2, 8, groups, prefix)
        cases = [random_case(2, d_out, groups, prefix) for d_out in rows]
        scales, biases = (torch.cat([case[i] for case in cases]) for i in (3, 4))
        whole = int8.plan(2, sum(rows), groups, prefix, matrices=len(rows))
        planes = [case[1] for case in cases]
        got = on_host(build(whole), x, planes, tables, scales, biases, torch.float32, grid=2)
        parts = [
            on_host(build(int8.plan(2, len(case[3]), groups, prefix)), x, [case[1]], tables,
                    case[3], case[4], torch.float32, grid=1)
            for case in cases
        ]  # fmt: skip
        assert torch.equal(got, torch.cat(parts, 1))


@pytest.mark.parametrize("block", [None, 8, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_and_rounding(build, block, dtype):
    """Every step is within rounding of that of the rotated input; the unit is its block's."""
    library = build(int8.plan(1, 1, 1, 1))
    for d in (8, 24, 64, 136, 576, 1024, 4096, 344 * 8):
        rotation = Rotation.make(d, seed=d)
        if block is not None:
            rotation = replace(rotation, block=block, odd=None)
        if d % 64:
            rotation = rotation.scale(torch.rand(d) + 0.5)
        x = torch.randn(2, d, generator=torch.Generator().manual_seed(d)).to(dtype)
        steps, units = rotate_on_host(library, x, rotation)
        blocks = units.shape[1]
        want = torch.zeros(2, blocks * 128, dtype=torch.float64)
        want[:, :d] = rotation.apply(x.double())
        want = want.view(2, blocks, 128)
        assert (units - want.abs().amax(2) / 127).abs().max() < 1e-6
        got = steps.view(2, blocks, 128)
        assert (got * units.double()[..., None] - want).abs().max() <= 0.5001 * units.max()
        assert not steps[:, d:].any()


@pytest.mark.parametrize("prefix", [1, 3, 7])
def test_decoding_is_exact(tmp_path, prefix):
    """dense.cu against the reference, bit for bit, on rows of odd sizes."""
    library = compiled(tmp_path, DENSE, "dense", dense.defines(prefix) | {"THREADS": 64})
    for rows, groups in ((5, 9), (3, 130), (2, 256)):
        _, codes, tables, scales, _ = random_case(1, rows, groups, prefix)
        tables = tables.half()
        for kind in (torch.float32, torch.float16):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                out = torch.full((rows, 8 * groups), 7.0, dtype=dtype)
                rough = scales.to(kind)
                library.host_decode(*dense.arguments(codes, tables, rough, out), 2)
                want = decode(codes, list(tables.float()), rough, prefix, dtype)
                assert torch.equal(out, want)


def test_a_row_does_not_depend_on_company(build):
    x, codes, *rest = random_case(16, 40, 96, 2)
    plan = int8.plan(16, 40, 96, 2)
    together = on_host(build(plan), x, [codes], *rest, torch.float32, grid=1)
    for n in (1, 2, 3, 7):
        library = build(int8.plan(n, 40, 96, 2))
        got = on_host(library, x[:n], [codes], *rest, torch.float32, grid=2)
        assert torch.equal(got, together[:n])


def test_a_site_from_end_to_end(build, monkeypatch):
    """`CudaGroup`, the device's part done by the host: two launches for up to four matrices."""
    launches = []

    class OnHost:
        def __init__(self, name, plan):
            self.name, self.library = name, build(plan or int8.plan(1, 1, 1, 1))

        def resident(self, threads, shared):
            return 2

        def launch(self, grid, threads, shared, arguments, overlap=False):
            launches.append((self.name, overlap))
            if self.name == "product":
                self.library.host_product(*arguments, grid[0])
            else:
                self.library.host_rotate(*arguments, *grid, threads)

    limits = SimpleNamespace(shared_memory_per_block_optin=int8._SHARED, multi_processor_count=2)
    monkeypatch.setattr(int8, "_function", lambda name, plan, device: OnHost(name, plan))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    monkeypatch.setattr(registry, "by_name", lambda name: SimpleNamespace(name=name))
    groups, rotation = 45, Rotation.make(360, seed=2).scale(torch.rand(360) + 0.5)
    x, _, tables, *_ = random_case(3, 8, groups, 2)
    specs = (BytesPlane(sign_symmetric=False),) * 2
    books = prepare_codebooks(BytesSet(specs, tuple({"": table} for table in tables)))
    cases = [random_case(1, rows, groups, 2) for rows in (40, 8, 33, 5, 16)]
    for count, expected in ((3, ["product"]), (5, ["product", "product"])):
        matrices = [
            Matrix(
                tuple(Plane.stored(c, specs[0], len(scales), 8 * groups) for c in codes),
                scales,
                bias if i else None,
            )
            for i, (_, codes, _, scales, bias) in enumerate(cases[:count])
        ]
        input_group = CudaGroup(matrices, books, rotation, 2, int8.NAME)
        launches.clear()
        y = input_group.gemv_rows(x)
        assert launches == [("rotate_rows", True), *[(name, True) for name in expected]]
        rotated = rotation.apply(x.double())
        want = torch.cat(
            [
                rotated @ decode(m.data(2), list(tables), m.scales, 2).double().T
                + (0 if m.bias is None else m.bias)
                for m in matrices
            ],
            1,
        )
        assert (y - want).norm() < 0.015 * want.norm()


def test_nan_and_infinity_reach_the_result(build):
    x = random_case(2, 5, 32, 2)[0]
    library = build(int8.plan(2, 5, 32, 2))
    for bad in (float("nan"), float("inf")):
        x[1, 200] = bad
        _, units = rotate_on_host(library, x, Rotation(256, 1, torch.ones(256), None))
        assert units.isnan().tolist() == [[False, False], [False, True]]
        assert not units[0].isinf().any()
        _, units = rotate_on_host(library, x, Rotation.make(256, seed=0))
        assert units.isnan().tolist() == [[False, False], [True, True]]


def test_the_error_is_what_the_note_says():
    """Of both roundings together, on the set that ships and Gaussian inputs: about 1 %."""
    tables = device_entries(torch.stack(universal_set((2, 3, 4)).entries), "cpu")
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
        int8.check_fits(Rotation(1 << 21, 1, torch.ones(1), None), 4)
    with pytest.raises(KernelError, match=r"factor of 65536.* triton"):
        int8.check_fits(Rotation(1 << 16, 1 << 16, torch.ones(1 << 16), None), 1)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: None)
    with pytest.raises(KernelError, match="NVRTC library"):
        nvrtc.compile_source("", "empty", {}, "sm_90")


@pytest.mark.skipif(bool(nvrtc.missing()), reason=f"cannot compile: {nvrtc.missing()}")
@pytest.mark.parametrize("architecture", ["compute_80", "sm_90"])
def test_compiles_for_devices(architecture):
    for n, d_out, groups, prefix in (*SHAPES, *LARGE):
        defines = int8.plan(n, d_out, groups, prefix).defines()
        image = nvrtc.compile_source(int8.SOURCE, "int8", defines, architecture)
        assert b"product" in image
        assert b"rotate_rows" in image
        check_resources(image, {"product", "rotate_rows"})
    for planes in (1, 4, 8):
        assert b"decode" in nvrtc.compile_source(
            dense.SOURCE, "dense", dense.defines(planes), architecture
        )
    with pytest.raises(KernelError, match="does not compile for"):
        nvrtc.compile_source("nonsense", "int8", {}, architecture)
