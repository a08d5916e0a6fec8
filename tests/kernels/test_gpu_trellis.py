"""The CUDA kernel "cuda-i16" without a GPU: its own source, compiled for the host, bit for bit.

As test_gpu_int8.py: trellis.cu and trellis_dense.cu are built over cuda_on_cpu.h. The reference
states the arithmetic that trellis.cu promises, in numpy; integer sums are exact, so everything must
agree in every bit.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_on_cpu import check_resources, compiled
from torch import Tensor

from dropbydrop.coding.codebook_set import TrellisSet
from dropbydrop.coding.codebooks import universal_set
from dropbydrop.coding.planes import TrellisPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import Matrix, Plane, prepare_codebooks, registry
from dropbydrop.kernels.cuda import CudaGroup, int8, nvrtc, trellis, trellis_tables

GLUE = """
#include "cuda_on_cpu.h"
#include "numbers.cu"
#include "rotate.cu"
#include "labels.cu"
#include "trellis.cu"
extern "C" void host_rotate(const void *x, const float *signs, const float *factor, float *rotated,
                            u32 *largest, u32 *arrived, int type, int d, int odd, int size,
                            int span, int width, int counters, int grid, int rows, int threads) {
  run(grid, rows, threads, [&] {
    rotate_floats(x, signs, factor, rotated, largest, arrived, type, d, odd, size, span, width,
                  counters);
  });
}
extern "C" void host_product(Matrices all, Planes planes, const uint2 *tables, const u32 *values,
                             const uint4 *pairs, const u32 *folds, const float *scales,
                             const float *rotated, const u32 *largest, const float *row_scales,
                             const float *bias, long long *parts, u32 *arrived, void *out, int type,
                             int n, int d, int width, int spans, int splits, int chunk, int grid) {
  run(grid, (n + N - 1) / N, THREADS, [&] {
    product(all, planes, tables, values, pairs, folds, scales, rotated, largest, row_scales, bias,
            parts, arrived, out, type, n, d, width, spans, splits, chunk);
  });
}
"""

DENSE = """
#include "cuda_on_cpu.h"
#include "numbers.cu"
#include "labels.cu"
#include "trellis_dense.cu"
extern "C" void host_decode(Codes codes, Planes planes, const uint2 *tables, const u32 *values,
                            const float *scales, const void *row_scales, void *out, int scale_type,
                            int type, int rows, int d, int grid) {
  run(grid, 1, THREADS, [&] {
    decode(codes, planes, tables, values, scales, row_scales, out, scale_type, type, rows, d);
  });
}
"""
LIMIT = 227 << 10  # bytes of shared memory of a block on compute capability 9.0


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(plan) -> the library of trellis.cu compiled with the constants of a plan."""
    folder, built = tmp_path_factory.mktemp("trellis"), {}

    def library(plan: trellis.Plan) -> ctypes.CDLL:
        if plan not in built:
            defines = plan.defines() | {"THREADS": 64}
            built[plan] = compiled(folder, GLUE, f"trellis-{len(built)}", defines)
        return built[plan]

    return library


def random_set(bits: tuple[int, ...], window: int = 12) -> TrellisSet:
    gen = torch.Generator().manual_seed(window)
    parts = tuple(
        {
            "": torch.randint(-63, 64, (64,), generator=gen, dtype=torch.int8),
            ".scale": torch.rand(1, generator=gen) * 0.1,
            ".taps": torch.randint(1, 64, (window,), generator=gen, dtype=torch.uint8),
        }
        for _ in bits
    )
    return TrellisSet(tuple(TrellisPlane(b, window) for b in bits), parts)


def random_codes(books: TrellisSet, d_out: int, d_in: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(d_out * d_in)
    return [
        torch.randint(0, 256, plane.shape(d_out, d_in), generator=gen, dtype=torch.uint8)
        for plane in books.planes
    ]


def plan_of(n: int, d: int, books: TrellisSet, limit: int = LIMIT) -> trellis.Plan:
    return trellis.plan(n, d, limit, trellis_tables.prepare(books, "cpu").extra)


def reference(x: Tensor, codes: list[Tensor], books: TrellisSet, scales: Tensor, bias: Tensor):
    """float32 [n, d_out] for x float32 [n, d_in], rotated, in the arithmetic of trellis.cu."""
    one = np.float32(1)
    largest = x.abs().amax(1, keepdim=True).numpy()
    inverse = np.float32(trellis.MOST_STEPS) / largest
    steps = np.rint(x.numpy() * inverse).astype(np.int64)
    total = np.zeros((x.shape[0], len(scales)), np.float32)
    for m, (plane, part) in enumerate(zip(codes, books.parts, strict=True)):
        values = part[""].numpy().astype(np.int64)[books.index(m, plane, len(scales)).numpy()]
        total += (steps @ values.T).astype(np.float32) * part[".scale"].numpy()
    return total * (one / inverse) * scales.numpy() + bias.numpy()


def rotate_on_host(library, x: Tensor, rotation: Rotation, rows) -> trellis.Inputs:
    """`rotate_floats` as compiled into `library`; poisoned before."""
    to = trellis.new_inputs(x, rotation, rows)
    for tensor in (to.rotated, to.largest, to.arrived):
        tensor.fill_(99)
    _, grid, threads = int8.spans(rotation)
    library.host_rotate(*trellis.rotate_arguments(x, rotation, to), grid, x.shape[0], threads)
    assert not to.arrived.any()
    return to


def identity(d: int) -> Rotation:
    return Rotation(d, 1, torch.ones(d), None)


def on_host(library, inputs, planes, rows, books, scales, bias, dtype, cut, blocks=2) -> Tensor:
    out = torch.full((inputs.rotated.shape[0], sum(rows)), 7.0, dtype=dtype)
    tables = trellis_tables.prepare(books, "cpu")
    parts, *arguments = trellis.product_arguments(
        inputs, planes, rows, tables, scales, bias, out, cut
    )
    parts.fill_(1 << 50)
    library.host_product(*arguments, blocks * len(planes[0]))
    inputs.arrived.zero_()
    return out


def case(n: int, rows: tuple[int, ...], d: int, books: TrellisSet):
    gen = torch.Generator().manual_seed(n * d)
    x = torch.randn(n, d, generator=gen)
    scales, bias = (torch.rand(sum(rows), generator=gen) + 0.5 for _ in range(2))
    return x, [random_codes(books, count, d) for count in rows], scales, bias


def cuts(d: int):
    """Every way to cut the inputs into chunks that `splits` may choose."""
    return {trellis.splits(1, d, blocks, 4) for blocks in (1, 3, 100)}


# n, rows of matrices, d_in, bits, window: rings of 3 bytes, tails of tiles and of inputs, odd d_in
SHAPES = [
    (1, (37,), 576, (2, 1, 1), 12),
    (2, (3,), 40, (1,), 8),
    (3, (130, 16, 5), 264, (2,), 14),
    (1, (33, 8, 70, 1), 72, (1, 2), 17),
    (9, (20,), 130, (2, 1), 12),
    (16, (64, 48), 45, (1, 1), 13),
]


@pytest.mark.parametrize("limit", [LIMIT, 99 << 10])
@pytest.mark.parametrize(("n", "rows", "d", "bits", "window"), SHAPES)
def test_products_are_exact(build, n, rows, d, bits, window, limit):
    """By pairs of rows, or by labels where shared memory is small."""
    books = random_set(bits, window)
    x, planes, scales, bias = case(n, rows, d, books)
    chosen = plan_of(n, d, books, limit)
    assert (max(0, max(bits) + window - 16) if limit == LIMIT else -1) == chosen.EXTRA
    assert chosen.shared <= limit
    library = build(chosen)
    inputs = rotate_on_host(library, x, identity(d), rows)
    assert torch.equal(inputs.rotated[:, :d], x)
    firsts = np.cumsum([0, *rows])
    want = np.concatenate(
        [
            reference(x, codes, books, scales[a:b], bias[a:b])
            for codes, a, b in zip(planes, firsts, firsts[1:], strict=False)
        ],
        1,
    )
    for cut in cuts(d):
        for blocks in (1, 3):
            got = on_host(
                library, inputs, planes, rows, books, scales, bias, torch.float32, cut, blocks
            )
            assert np.array_equal(got.numpy(), want)
    for dtype in (torch.bfloat16, torch.float16):
        got = on_host(library, inputs, planes, rows, books, scales, bias, dtype, cut)
        assert torch.equal(got, torch.from_numpy(want).to(dtype))


def test_a_row_does_not_depend_on_company(build):
    books, rows, d = random_set((2, 1)), (40,), 192
    x, planes, scales, _ = case(16, rows, d, books)

    def product(n: int) -> Tensor:
        library = build(plan_of(n, d, books))
        inputs = rotate_on_host(library, x[:n], identity(d), rows)
        cut = trellis.splits(trellis.tiles_of(rows), d, 2, 4)
        return on_host(library, inputs, planes, rows, books, scales, None, torch.float32, cut)

    together = product(16)
    for n in (1, 2, 3, 7):
        assert torch.equal(product(n), together[:n])


def test_an_input_group_from_end_to_end(build, monkeypatch):
    """`CudaGroup`, the device's part done by the host: two launches for up to four matrices."""
    launches = []

    class OnHost:
        def __init__(self, name, plan):
            self.name, self.library = name, build(plan or trellis.plan(1, 4, LIMIT, (0,)))

        def resident(self, threads, shared):
            return 2

        def launch(self, grid, threads, shared, arguments, overlap=False):
            launches.append(self.name)
            if self.name == "product":
                self.library.host_product(*arguments, grid[0])
            else:
                self.library.host_rotate(*arguments, *grid, threads)

    limits = SimpleNamespace(shared_memory_per_block_optin=LIMIT, multi_processor_count=2)
    monkeypatch.setattr(trellis, "_function", lambda name, plan, device: OnHost(name, plan))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: limits)
    monkeypatch.setattr(registry, "by_name", lambda name: SimpleNamespace(name=name))
    books, d = random_set((2, 1, 1)), 360
    rotation = Rotation.make(d, seed=2).scale(torch.rand(d) + 0.5)
    for n, rows in ((3, (40, 8, 33)), (9, (20, 3, 16, 17, 5))):
        x, planes, scales, bias = case(n, rows, d, books)
        x = x.bfloat16()
        matrices, want = [], []
        for i, (codes, s, b) in enumerate(
            zip(planes, scales.split(rows), bias.split(rows), strict=True)
        ):
            given = zip(codes, books.planes, strict=True)
            held = tuple(Plane.stored(c, spec, len(s), d) for c, spec in given)
            matrices.append(Matrix(held, s, b if i else None))
            weight = books.decode(codes, s, 2).double()
            want.append(rotation.apply(x.double()) @ weight.T + (b if i else 0))
        input_group = CudaGroup(matrices, prepare_codebooks(books), rotation, 2, trellis.NAME)
        launches.clear()
        y = input_group.gemv_rows(x)
        assert launches == ["rotate_floats", *["product"] * (1 if len(rows) < 5 else 2)]
        assert y.dtype == x.dtype
        want = torch.cat(want, 1)
        assert (y - want).norm() < 3e-3 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation(build, dtype):
    library = build(trellis.plan(1, 4, LIMIT, (0,)))
    for d in (8, 24, 136, 576, 1024, 4096, 344 * 8):
        rotation = Rotation.make(d, seed=d).scale(torch.rand(d) + 0.5)
        x = torch.randn(2, d, generator=torch.Generator().manual_seed(d)).to(dtype)
        inputs = rotate_on_host(library, x, rotation, (5,))
        want = rotation.apply(x.double())
        assert (inputs.rotated[:, :d] - want).abs().max() < 1e-5 * want.abs().max()
        assert not inputs.rotated[:, d:].any()
        largest = inputs.largest.view(torch.float32).amax(1)
        assert torch.equal(largest, inputs.rotated.abs().amax(1))


def test_nan_infinity_and_zeros_reach_the_result(build):
    books, rows, d = random_set((2,)), (5,), 256
    x, planes, scales, bias = case(4, rows, d, books)
    library = build(plan_of(4, d, books))
    x[1, 200], x[2, 3], x[3] = float("nan"), float("inf"), 0
    inputs = rotate_on_host(library, x, identity(d), rows)
    got = on_host(library, inputs, planes, rows, books, scales, bias, torch.float32, (1, d))
    assert got.isnan().all(1).tolist() == [False, True, True, False]
    assert not got[0].isnan().any()
    assert torch.equal(got[3], bias)


@pytest.mark.parametrize(("bits", "window"), [((2,), 12), ((2, 1, 1), 14), ((1, 2, 1, 1, 1), 17)])
def test_decoding_is_exact(tmp_path, bits, window):
    """trellis_dense.cu against the reference, bit for bit."""
    books, libraries = random_set(bits, window), {}
    for d_out, d in ((5, 12), (37, 132), (16, 45)):
        defines = trellis.dense_defines(len(bits), trellis.vector_of(d), LIMIT)
        key = tuple(defines.items())
        if key not in libraries:
            name = f"dense-{len(libraries)}"
            libraries[key] = compiled(tmp_path, DENSE, name, defines | {"THREADS": 64})
        codes, tables = random_codes(books, d_out, d), trellis_tables.prepare(books, "cpu")
        scales = torch.rand(d_out) + 0.5
        for kind in (torch.float32, torch.float16):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                out = torch.full((d_out, d), 7.0, dtype=dtype)
                rough = scales.to(kind)
                libraries[key].host_decode(
                    *trellis.dense_arguments(codes, bits, tables.tensors, rough, out), 2
                )
                assert torch.equal(out, books.decode(codes, rough, len(bits), dtype))


def test_work_is_cut_for_the_device():
    """Every chunk is inside of what 32 bits hold, and none is empty."""
    for d in (40, 4096, 28672, 1 << 18):
        for tiles in (1, 256, 1792):
            for blocks in (1, 88, 264):
                count, chunk = trellis.splits(tiles, d, blocks, 12)
                assert (count - 1) * chunk < d <= count * chunk
                assert chunk % 128 == 0
                assert 63 * trellis.MOST_STEPS * chunk // 32 < 2**31
    assert trellis.splits(8192, 8192, 44, 32)[0] == 1  # enough tiles
    assert trellis.splits(256, 4096, 132, 32)[0] == 8  # half of the warps of every block
    assert trellis.splits(16, 8192, 132, 32)[0] > 8
    assert trellis.table_bytes(128) <= 99 << 10


def test_pairs_need_bits_that_fold():
    """A bit that changes the labels as no younger one does keeps a plane to its labels."""
    books = random_set((2, 1), 17)
    assert trellis_tables.prepare(books, "cpu").extra == (3, 2)
    books.parts[1][".taps"][:-1] = 0
    extra = trellis_tables.prepare(books, "cpu").extra
    assert extra == (3, -1)
    assert trellis.plan(1, 64, LIMIT, extra[:1]).EXTRA == 3
    assert trellis.plan(1, 64, LIMIT, extra).EXTRA == -1


def test_universal_sets_have_pairs():
    for window in (12, 14, 16):
        books = universal_set((2, 3, 4), None, "trellis", window)
        extra = trellis_tables.prepare(books, "cpu").extra
        assert extra == tuple(max(0, plane.window + plane.bits - 16) for plane in books.planes)


@pytest.mark.skipif(bool(nvrtc.missing()), reason=f"cannot compile: {nvrtc.missing()}")
@pytest.mark.parametrize("architecture", ["compute_80", "sm_90"])
def test_compiles_for_devices(architecture):
    for n in (1, 2, 16):
        for d, extra in ((64, 0), (45, 3), (64, 2), (64, -1)):
            defines = trellis.plan(n, d, LIMIT, (extra,)).defines()
            image = nvrtc.compile_source(trellis.SOURCE, "trellis", defines, architecture)
            assert b"product" in image
            assert b"rotate_floats" in image
            check_resources(image, {"product", "rotate_floats"})
    for planes in (1, 3, 8):
        defines = trellis.dense_defines(planes, 4, LIMIT)
        image = nvrtc.compile_source(trellis.DENSE, "trellis_dense", defines, architecture)
        assert b"decode" in image


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
class TestDevice:
    """On the device itself, bit for bit."""

    @pytest.mark.parametrize(("window", "limit"), [(12, LIMIT), (17, LIMIT), (12, 99 << 10)])
    def test_products(self, window, limit, monkeypatch):
        """By pairs, with folded bits, by labels."""
        monkeypatch.setattr(trellis, "shared_memory", lambda device: limit)
        for bits, d, rows in (
            ((2, 1, 1), 2048, (1000, 70, 33)),
            ((1,), 45, (5,)),
            ((2, 2), 130, (40,)),
        ):
            books = random_set(bits, window)
            tables = trellis_tables.prepare(books, "cuda")
            for n in (1, 2, 3, 9, 16):
                x, planes, scales, bias = case(n, rows, d, books)
                inputs = trellis.rotate_rows(x.cuda(), identity(d).to("cuda"), rows)
                held = [[codes.cuda() for codes in own] for own in planes]
                got = trellis.product(
                    inputs, held, rows, tables, scales.cuda(), bias.cuda(), torch.float32
                )
                firsts = np.cumsum([0, *rows])
                for codes, a, b in zip(planes, firsts, firsts[1:], strict=False):
                    want = reference(x, codes, books, scales[a:b], bias[a:b])
                    assert np.array_equal(got[:, a:b].cpu().numpy(), want)

    def test_decoding(self):
        for bits, d, rows in (
            ((2, 1, 1), 616, 333),
            ((2,), 45, 37),
            ((1, 2, 1, 1, 1, 1), 320, 100),
        ):
            books = random_set(bits)
            codes, scales = random_codes(books, rows, d), torch.rand(rows) + 0.5
            tables, held = trellis_tables.prepare(books, "cuda"), [plane.cuda() for plane in codes]
            for prefix in range(1, len(bits) + 1):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    got = torch.ops.dropbydrop.gpu_trellis_decode(
                        held[:prefix], *tables.tensors, bits[:prefix], scales.cuda(), dtype
                    )
                    assert torch.equal(got.cpu(), books.decode(codes, scales, prefix, dtype))
