"""Every kernel against naive arithmetic: the same tests for each one this machine supports.

The reference is float64 on weights decoded by plain indexing in this file. Native programs
(sanitizers, NEON under an emulator) are built and run by the tests marked slow.
"""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dropbydrop import kernels
from dropbydrop.coding.codebook_set import BytesSet, TrellisSet
from dropbydrop.coding.planes import KINDS, BytesPlane, TrellisPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import CpuGroup, Matrix, Plane, layout, registry
from dropbydrop.kernels.cpu import ops
from dropbydrop.kernels.cpu.cpu_group import decode_rows
from dropbydrop.system.errors import KernelError
from dropbydrop.system.native_library import library

NATIVE = Path(__file__).parents[2] / "native"
NAMES = [kernel.name for kernel in registry.table()]


@pytest.fixture(autouse=True)
def quiet():
    """The same numbers every time, and one thread: these products are too small for more."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=NAMES)
def kernel(request) -> str:
    found = next(k for k in registry.table() if k.name == request.param)
    if not found.supported:
        pytest.skip(f"{found.name}: {found.reason}")
    return found.name


def device(kernel: str) -> str:
    """Where the tensors of a kernel must be; Triton's interpreter takes those of the CPU."""
    return "cpu" if registry.by_name(kernel).takes("cpu") else "cuda"


def native_only(name: str) -> str:
    if name == "torch":
        pytest.skip("torch has products of its own")
    if registry.by_name(name).gpu:
        pytest.skip(f"{name} is no native kernel")
    return name


@pytest.fixture(params=list(KINDS))
def kind(request, kernel) -> str:
    """A kind of planes that the kernel reads."""
    if not registry.by_name(kernel).reads(request.param):
        pytest.skip(f"{kernel} does not read planes of kind {request.param}")
    return request.param


def bytes_set(planes: int, gen: torch.Generator, symmetric: bool = True) -> BytesSet:
    """Random codebooks of byte planes, each half the size of the last."""
    shape = (128 if symmetric else 256), 8
    stored = [torch.randn(*shape, generator=gen) * 0.5**m for m in range(planes)]
    specs = (BytesPlane(sign_symmetric=symmetric),) * planes
    return BytesSet(specs, tuple({"": table} for table in stored))


def trellis_set(planes: int, gen: torch.Generator, window: int | None = None) -> TrellisSet:
    """Random taps and values; 2 bits a weight in the first plane, 1 in the others."""
    specs, parts = [], []
    for m in range(planes):
        length = window or int(torch.randint(8, 18, (), generator=gen))
        values = torch.randint(-63, 64, (64,), generator=gen).to(torch.int8)
        specs.append(TrellisPlane(2 if m == 0 else 1, length))
        parts.append(
            {
                "": values,
                ".scale": torch.rand(1, generator=gen) * 0.03 * 0.5**m,
                ".taps": torch.randint(0, 64, (length,), generator=gen).to(torch.uint8),
            }
        )
    return TrellisSet(tuple(specs), tuple(parts))


class Case:
    """Random codes, codebooks, scales and inputs of one matrix, with its exact product."""

    def __init__(
        self,
        rows,
        groups,
        planes,
        symmetric=True,
        n=1,
        outlier=False,
        seed=0,
        kind="bytes",
        books=None,
    ):
        gen = torch.Generator().manual_seed(seed + rows + 1000 * groups + planes)

        def normal(*shape):
            return torch.randn(*shape, generator=gen)

        self.rows, self.groups, self.planes, self.kind = rows, groups, planes, kind
        self.d_in = 8 * groups
        drawn = bytes_set(planes, gen, symmetric) if kind == "bytes" else trellis_set(planes, gen)
        self.set = drawn if books is None else books
        self.codes = [
            torch.randint(0, 256, spec.shape(rows, self.d_in), generator=gen, dtype=torch.uint8)
            for spec in self.set.planes
        ]
        self.scales = torch.rand(rows, generator=gen) + 0.5
        self.bias = normal(rows)
        self.x = normal(n, groups * 8)
        if outlier:  # about 20 times the rms of the row
            for row in self.x:
                row[torch.randint(0, groups * 8, (1,), generator=gen)] = 20.6
        self.books = kernels.prepare_codebooks(self.set)
        self.planes_held = kernels.pack(self.codes, self.set.planes, rows, self.d_in)
        self.matrix = Matrix(self.planes_held, self.scales)

    @property
    def tables(self) -> list[Tensor]:
        return list(self.set.entries)

    def plane(self, m: int) -> Tensor:
        """Values of plane m, float64 [d_out, d_in] before scaling, by plain indexing."""
        part, codes = self.set.parts[m], self.codes[m]
        if self.kind == "bytes":
            table = part[""].double()
            table = torch.cat([table, -table])[:256]
            return table[codes.long()].view(self.rows, -1)
        return self.integers(m).double() * part[".scale"].double()

    def integers(self, m: int) -> Tensor:
        """Integer values of a trellis plane, int64 [d_out, d_in], bit by bit."""
        part, k = self.set.parts[m], self.set.planes[m].bits
        taps, bits = part[".taps"].tolist(), self.codes[m].numpy()
        out = []
        for row in range(self.rows):
            label = np.zeros(self.d_in, np.uint8)
            for age, tap in enumerate(taps):
                i = (k * row + k - 1 - age) % (8 * len(bits))  # a ring
                label ^= (bits[i // 8] >> (i % 8) & 1) * np.uint8(tap)
            out.append(part[""].long()[torch.from_numpy(label).long()])
        return torch.stack(out)

    def weight(self, prefix: int) -> Tensor:
        """Decoding by indexing, in float64."""
        whole = sum(self.plane(m) for m in range(prefix))
        return whole * self.scales.double()[:, None]

    def exact(self, prefix: int, x: Tensor | None = None) -> Tensor:
        return (self.x if x is None else x).double() @ self.weight(prefix).T

    def integer(self, prefix: int, x: Tensor | None = None) -> Tensor:
        """The product with trellis planes as native/kernels/trellis.h defines it: exact sums of
        integers, then float32 operations in a fixed order, each rounded."""
        x = self.x if x is None else x
        most = np.float32(127 * 256 + 127)
        rows = []
        for row in x.numpy():
            factor = most / np.abs(row).max()  # float32
            step, whole = np.float32(1) / factor, np.rint(row * factor).astype(np.int64)
            total = np.zeros(self.rows, np.float32)
            for m in range(prefix):
                sums = self.integers(m).numpy() @ whole
                total = total + sums.astype(np.float32) * self.set.parts[m][".scale"].numpy()
            rows.append(total * step * self.scales.numpy())
        return torch.from_numpy(np.stack(rows))

    def run(self, kernel: str, prefix: int, x: Tensor | None = None) -> Tensor:
        identity = Rotation(self.d_in, 1, torch.ones(self.d_in), None)
        place, x = device(kernel), self.x if x is None else x
        matrix = Matrix(self.planes_for(kernel), self.scales.to(place))
        group = kernels.prepare_group([matrix], self.books, identity, prefix, kernel)
        return group(x.to(place))[0].to(x)

    def planes_for(self, kernel: str) -> tuple[Plane, ...]:
        """For GPU kernels the planes as they are stored, not copied on the CPU."""
        return self.stored(device(kernel)) if registry.by_name(kernel).gpu else self.planes_held

    def stored(self, at: str = "cpu") -> tuple[Plane, ...]:
        """The planes as they are stored."""
        given, shape = zip(self.codes, self.set.planes, strict=True), (self.rows, self.d_in)
        return tuple(Plane.stored(codes.to(at), spec, *shape) for codes, spec in given)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def tolerance(kernel: str, outlier: bool = False) -> float:
    if kernel == "torch":
        return 1e-5
    if kernel.endswith("-u8"):
        return 0.08 if outlier else 0.02
    if kernel == "cuda-i8":
        return 0.08 if outlier else 0.03
    return 1e-3


class TestProduct:
    def test_every_prefix(self, kernel, kind):
        case = Case(100, 20, 8, n=2, kind=kind)
        for prefix in range(1, 9):
            assert relative(case.run(kernel, prefix), case.exact(prefix)) < tolerance(kernel)

    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("groups", [1, 2, 8, 127, 129, 300])
    def test_shapes(self, kernel, kind, groups, symmetric):
        many = groups > 8 and registry.by_name(kernel).gpu and not torch.cuda.is_available()
        if many and not symmetric:  # 10 to 30 s each
            pytest.skip("interpreted: wide matrices with symmetric codebooks alone")
        for rows in (65,) if many else (1, 63, 64, 65, 192, 300):
            case = Case(rows, groups, 2, symmetric, n=3, kind=kind)
            error = (case.run(kernel, 2) - case.exact(2)).norm()
            # The size an output has on average: a few of them can cancel.
            usual = case.weight(2).norm() * case.x.norm() / (8 * groups) ** 0.5
            assert error / usual < tolerance(kernel)

    def test_outliers(self, kernel, kind):
        interpreted = registry.by_name(kernel).gpu and not torch.cuda.is_available()
        for groups in (51,) if interpreted else (51, 72, 128, 200):
            case = Case(96, groups, 3, n=4, outlier=True, kind=kind)
            rms = case.x.square().mean(1).sqrt()
            assert (case.x.abs().amax(1) / rms > 13).all()
            got, want = case.run(kernel, 3), case.exact(3)
            for i in range(4):
                assert relative(got[i], want[i]) < tolerance(kernel, True)

    def test_reads_only_its_planes(self, kernel, kind):
        case = Case(70, 9, 3, kind=kind)
        before = case.run(kernel, 2)
        case.planes_held[2].data.random_(0, 256)
        case.codes[2].random_(0, 256)
        assert torch.equal(case.run(kernel, 2), before)

    def test_rows_do_not_depend_on_company(self, kernel, kind):
        case = Case(130, 140, 3, n=16, outlier=True, kind=kind)
        native_only(kernel)  # torch's own product is not batch-invariant
        together = case.run(kernel, 3)
        for n in range(1, 17):
            assert torch.equal(case.run(kernel, 3, case.x[:n]), together[:n])
            assert torch.equal(case.run(kernel, 3, case.x[16 - n :]), together[16 - n :])

    def test_threads_do_not_change_bits(self, kernel, kind):
        case = Case(500, 130, 2, n=3, kind=kind)
        native_only(kernel)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run(kernel, 2))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_same_bits_on_every_instruction_set(self, kernel, kind):
        native_only(kernel)
        reference = "portable-u8" if kernel.endswith("-u8") else "portable"
        for symmetric in (True, False):
            case = Case(150, 133, 3, symmetric, n=2, outlier=True, kind=kind)
            assert torch.equal(case.run(kernel, 3), case.run(reference, 3))

    def test_trellis_products_are_those_of_the_naive_reference(self, kernel):
        """Bit for bit, so for every kernel, number of threads and of rows alike."""
        native_only(kernel)
        for rows, groups, planes in ((1, 1, 1), (70, 9, 3), (300, 16, 4), (130, 140, 2)):
            case = Case(rows, groups, planes, n=3, outlier=True, kind="trellis")
            for prefix in range(1, planes + 1):
                assert torch.equal(case.run(kernel, prefix), case.integer(prefix))
                assert relative(case.run(kernel, prefix), case.exact(prefix)) < 1e-3

    def test_many_rows_take_the_dense_path(self, kernel, kind):
        case = Case(100, 9, 2, n=kernels.MAX_GEMV_ROWS + 1, kind=kind)
        assert relative(case.run(kernel, 2), case.exact(2)) < 1e-5
        route = registry.route(case.x.to(device(kernel)), kernel)
        assert route == ("dense", kernel)
        few = registry.route(case.x[1:].to(device(kernel)), kernel)
        assert (few[0] == "dense") == (kernel == "torch")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("n", [1, 5, 200])
    def test_types_bias_and_sites(self, kernel, kind, dtype, n):
        q = Case(72, 18, 2, seed=1, n=n, kind=kind)
        k = Case(40, 18, 2, seed=2, kind=kind, books=q.set)
        rotation = Rotation.make(144, seed=3)
        x = q.x.to(dtype).view(n, 1, 144)
        at = device(kernel)
        matrices = [
            Matrix(q.planes_for(kernel), q.scales.half().to(at)),
            Matrix(k.planes_for(kernel), k.scales.to(at), k.bias.to(at, dtype)),
        ]
        q.scales = q.scales.half().float()
        group = kernels.prepare_group(matrices, q.books, rotation.to(at), 2, kernel)
        ys = group(x.to(at))
        ys = [y.cpu() for y in ys]
        rotated = rotation.apply(x.double()).view(n, 144)
        wanted = [q.exact(2, rotated), k.exact(2, rotated) + k.bias.to(dtype).double()]
        rounding = {torch.float32: 0, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        if kernel == "triton" and got_truncated():
            rounding *= 2  # inputs, weights and result are cut, not rounded
        for y, want, rows in zip(ys, wanted, (72, 40), strict=True):
            assert y.dtype == dtype
            assert y.shape == (n, 1, rows)
            assert relative(y.view(n, rows), want) < tolerance(kernel) + rounding

    def test_nothing_and_nan(self, kernel, kind):
        case = Case(64, 140, 1, kind=kind)
        assert not case.run(kernel, 1, torch.zeros(1, 1120)).any()
        x = case.x.clone()
        x[0, 1000] = float("nan")
        assert case.run(kernel, 1, x).isnan().all()

    def test_gradient_reaches_the_input(self, kernel, kind):
        case = Case(64, 8, 2, kind=kind)
        x = case.x.clone().requires_grad_()
        case.run(kernel, 2, x).sum().backward()
        assert x.grad is not None
        assert relative(x.grad[0], case.weight(2).sum(0)) < 1e-5


def decode_dense(planes, books, scales, prefix, dtype, kernel):
    """`kernels.decode_dense` where the kernel runs."""
    at = device(kernel)
    if at != "cpu":
        planes = [Plane.stored(p.to_stored().to(at), p.spec, p.d_out, p.d_in) for p in planes]
    matrix = Matrix(tuple(planes), scales.to(at))
    return kernels.decode_dense(matrix, books, prefix, dtype, kernel).cpu()


def got_truncated() -> bool:
    """Triton's interpreter cuts float32 to bfloat16 where every GPU rounds to nearest."""
    return registry.triton_interpreted()


class TestDecode:
    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("prefix", [1, 4, 6])
    def test_equals_reference_bit_for_bit(self, kernel, kind, prefix, packed):
        if packed and (library() is None or registry.by_name(kernel).gpu):
            pytest.skip("no native library to pack with, or a kernel that reads rows")
        for rows, groups, symmetric in [(70, 9, True), (1, 1, False), (64, 130, True)]:
            case = Case(rows, groups, 6, symmetric, kind=kind)
            planes = case.planes_held if packed else case.stored()
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for scales in (case.scales, case.scales.half()):
                    got = decode_dense(planes, case.books, scales, prefix, dtype, kernel)
                    want = case.set.decode(case.codes, scales, prefix, dtype)
                    if dtype == torch.bfloat16 and kernel == "triton" and got_truncated():
                        whole = case.set.decode(case.codes, scales, prefix)
                        want = (whole.view(torch.int32) >> 16).to(torch.int16).view(dtype)
                    assert got.dtype == dtype
                    assert torch.equal(got, want)

    def test_rows_alone(self, kernel, kind):
        """Rows first..last equal those of the whole matrix, wherever a window begins."""
        case = Case(150, 9, 4, kind=kind)
        if registry.by_name(kernel).gpu:
            pytest.skip("GPU kernels decode whole matrices")
        for dtype in (torch.float32, torch.float64):
            whole = case.set.decode(case.codes, case.scales, 4, dtype)
            for planes in (case.planes_held, case.stored()):
                matrix = Matrix(planes, case.scales)
                for rows in ((0, 1), (1, 2), (7, 40), (17, 18), (64, 128), (101, 150)):
                    got = decode_rows(matrix, case.books, 4, dtype, kernel, rows)
                    assert torch.equal(got, whole[slice(*rows)])


class TestRotation:
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("block", [None, 8, 1])
    def test_equals_reference(self, kernel, block, scaled):
        for d in (8, 16, 24, 64, 96, 576, 2048, 344):
            rotation = Rotation.make(d, seed=d)
            if block is not None:
                rotation = replace(rotation, block=block, odd=None)
            if scaled:
                rotation = rotation.scale(torch.rand(d) + 0.5)
            x = torch.randn(3, 2, d)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                at = device(kernel)
                got = kernels.rotate(x.to(at, dtype), rotation.to(at), kernel).cpu()
                want = rotation.apply(x.to(dtype).double())
                assert got.dtype == torch.float32
                assert (got - want).abs().max() < 1e-5


class TestRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_product(self, kernel, dtype):
        for count, d, n in ((9, 8, 1), (301, 72, 3), (1000, 576, 2), (7, 5001, 2), (50, 33, 40)):
            weight = torch.randint(-127, 128, (count, d), dtype=torch.int8)
            scales, bias = torch.rand(count).half() + 0.5, torch.randn(count)
            x = torch.randn(n, 1, d).to(dtype)
            want = x.double() @ weight.double().T * scales.double() + bias.to(dtype).double()
            at = device(kernel)
            parts = [part.to(at) for part in (x, weight, scales, bias)]
            got = kernels.rows_linear(*parts, kernel).cpu()
            assert got.dtype == dtype
            assert got.shape == (n, 1, count)
            limit = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
            assert relative(got, want) < limit

    def test_extremes_fit(self, kernel):
        for d in (512, 20000):
            at = device(kernel)
            weight = torch.full((5, d), -127, dtype=torch.int8, device=at)
            ones = torch.ones(1, d, device=at), torch.ones(5, device=at)
            got = kernels.rows_linear(ones[0], weight, ones[1], None, kernel)
            assert ((got + 127 * d).abs() < 1e-4 * 127 * d).all()

    def test_rows_do_not_depend_on_company(self, kernel):
        native_only(kernel)
        weight = torch.randint(-127, 128, (301, 72), dtype=torch.int8)
        x, scales = torch.randn(16, 72), torch.rand(301).half()
        together = kernels.rows_linear(x, weight, scales, None, kernel)
        for n in range(1, 17):
            assert torch.equal(
                kernels.rows_linear(x[:n], weight, scales, None, kernel), together[:n]
            )

    def test_nan(self, kernel):
        x = torch.ones(1, 64)
        x[0, 3] = float("inf")
        at = device(kernel)
        weight, scales = torch.ones(5, 64, dtype=torch.int8, device=at), torch.ones(5, device=at)
        assert not kernels.rows_linear(x.to(at), weight, scales, None, kernel).isfinite().any()

    def test_refuses_other_rows(self, kernel):
        with pytest.raises(ValueError, match="int8"):
            kernels.rows_linear(torch.ones(1, 8), torch.ones(4, 8), torch.ones(4), None, kernel)


@pytest.mark.skipif(library() is None, reason="the native library is not built")
class TestLayout:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("rows", "groups"), [(1, 1), (63, 5), (64, 128), (200, 300), (576, 72)]
    )
    def test_round_trip(self, rows, groups, kind):
        case = Case(rows, groups, 2, kind=kind)
        for plane, want in zip(case.planes_held, case.codes, strict=True):
            assert plane.packed
            assert torch.equal(plane.to_stored(), want)
            if registry.select(kind=kind).native:
                shape = plane.spec, rows, 8 * groups
                assert plane.data.numel() == kernels.plane_bytes(*shape)
                held = kernels.to_device_layout(want, *shape)
                assert torch.equal(held.data, plane.data)

    def test_order(self):
        """The documented order (native/kernels/geometry.h), spelled out."""
        rows, groups = 150, 131
        codes = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
        packed, at = layout.pack_bytes(codes), 0
        for block in range(0, groups, 64):
            for strip in range(0, 192, 64):
                for j in range(block, min(block + 64, groups)):
                    for byte in range(64):
                        row = strip + byte // 2 + 32 * (byte % 2)
                        assert packed[at] == (codes[row, j] if row < rows else 0)
                        at += 1
        assert at == packed.numel()

    def test_streams_are_padded_only_where_they_must_be(self):
        case = Case(70, 9, 3, kind="trellis")
        for plane, codes in zip(case.planes_held, case.codes, strict=True):
            assert torch.equal(plane.data[:, :72], codes)
            assert plane.data.shape[1] == 128
            assert not plane.data[:, 72:].any()
        case = Case(70, 16, 3, kind="trellis")
        for plane, codes in zip(case.planes_held, case.codes, strict=True):
            assert plane.data.data_ptr() == codes.data_ptr()
            assert plane.to_stored().data_ptr() == codes.data_ptr()

    @pytest.mark.parametrize("kind", KINDS)
    def test_planes_can_be_added(self, kind):
        case = Case(70, 20, 3, kind=kind)
        specs, shape = case.set.planes, (70, 160)
        more = kernels.pack(case.codes[:1], specs, *shape)
        more += kernels.pack(case.codes[1:], specs[1:], *shape)
        for plane, want in zip(more, case.planes_held, strict=True):
            assert torch.equal(plane.data, want.data)

    def test_refuses_other_codes(self):
        spec = [BytesPlane()]
        with pytest.raises(ValueError, match=r"codes of torch\.float32"):
            kernels.pack([torch.zeros(4, 4)], spec, 4, 32)
        with pytest.raises(ValueError, match=r"\(4, 5\).*uint8 \[4, 4\]"):
            kernels.pack([torch.zeros(4, 5).byte()], spec, 4, 32)
        case, other = Case(8, 1, 2, kind="trellis"), Case(8, 1, 2)
        with pytest.raises(ValueError, match="with codebooks of"):
            kernels.decode_dense(case.matrix, other.books, 2)

    def test_refuses_tensors_of_other_sizes(self, kind):
        """The last look before addresses are taken, whatever a reader has let through."""
        if library() is None:
            pytest.skip("no native library")
        case = Case(70, 9, 2, kind=kind)
        rotation, kernel = Rotation.make(72, seed=1), registry.select(kind=kind).name
        ops.describe_group([case.matrix], case.books, rotation, 2, kernel)
        short = tuple(replace(plane, data=plane.data[:-1]) for plane in case.matrix.planes)
        for change in (
            {"scales": case.matrix.scales[:-1]},
            {"scales": torch.ones(1)},
            {"bias": torch.zeros(71)},
            {"planes": short},
        ):
            matrix = replace(case.matrix, **change)
            with pytest.raises(ValueError, match="of an input group of 72 inputs"):
                ops.describe_group([matrix], case.books, rotation, 2, kernel)
        for other in (
            replace(rotation, signs=rotation.signs[:-1]),
            replace(rotation, signs=rotation.signs.double()),
            replace(rotation, odd=torch.ones(3, 3)),
            Rotation.make(80, seed=1),
        ):
            with pytest.raises(ValueError, match="of an input group of 72 inputs"):
                ops.describe_group([case.matrix], case.books, other, 2, kernel)

    def test_refuses_codebooks_that_are_not_finite(self):
        for value in (float("nan"), float("inf")):
            book = torch.ones(128, 8)
            book[3, 4] = value
            if library() is not None:
                with pytest.raises(ValueError, match="not finite"):
                    kernels.prepare_codebooks(BytesSet.of([book]))


class TestChoice:
    def test_torch_is_always_there(self):
        assert kernels.available()[-1].name == "torch"
        assert kernels.select("torch").name == "torch"

    def test_unknown_name(self):
        with pytest.raises(KernelError, match=r"'sse9' is not in this build.*torch"):
            kernels.select("sse9")
        case = Case(8, 1, 1)
        with pytest.raises(KernelError, match="sse9"):
            case.run("sse9", 1)

    def test_unsupported_name(self, monkeypatch):
        missing = registry.Kernel("neon9", "", 99, False, "this processor lacks the instructions")
        monkeypatch.setattr(registry, "table", lambda: (missing,))
        with pytest.raises(KernelError, match="cannot run here: this processor lacks"):
            registry.by_name("neon9")

    def test_environment(self, monkeypatch):
        for kernel in kernels.available():
            monkeypatch.setenv(registry.VARIABLE, kernel.name)
            assert kernels.select(device=device(kernel.name)) is kernel
        monkeypatch.setenv(registry.VARIABLE, "sse9")
        with pytest.raises(KernelError, match="sse9"):
            kernels.select()
        monkeypatch.delenv(registry.VARIABLE)
        assert kernels.select() is kernels.available()[0]

    def test_logs_what_runs(self, caplog):
        registry._preferred.cache_clear()
        registry._log_choice.cache_clear()
        with caplog.at_level("INFO", "dropbydrop.kernels"):
            kernels.select()
            kernels.select(kind="bytes")
        assert [kernels.select().name in record.message for record in caplog.records] == [True]

    def test_describe(self):
        lines = kernels.describe()
        assert len(lines) == len(NAMES)
        used = [line.split()[1] for line in lines if line.startswith("*")]
        assert set(used) == {kernels.select(kind=kind).name for kind in KINDS}

    def test_kinds(self, monkeypatch):
        """A kernel is chosen, and forced, only for planes that it reads."""
        table = tuple(replace(k, kinds=("bytes",)) if k.native else k for k in registry.table())
        monkeypatch.setattr(registry, "table", lambda: table)
        registry._preferred.cache_clear()
        best = kernels.available()[0].name
        assert kernels.select(kind="bytes").name == kernels.select().name == best
        assert kernels.select(kind="trellis").name == "torch"
        case = Case(70, 9, 2, kind="trellis", n=2)
        assert relative(case.run("torch", 2), case.exact(2)) < 1e-5
        if best != "torch":
            with pytest.raises(KernelError, match=f"'{best}' reads planes of kind bytes.*torch"):
                kernels.select(best, kind="trellis")
            with pytest.raises(KernelError, match="these are of kind trellis"):
                case.run(best, 1)
        registry._preferred.cache_clear()

    def test_works_without_the_library(self, monkeypatch):
        monkeypatch.setattr(layout, "library", lambda: None)
        monkeypatch.setattr(registry, "table", lambda: registry_torch())
        case = Case(70, 9, 2, n=2)
        assert not case.matrix.packed
        assert relative(case.run("torch", 2), case.exact(2)) < 1e-5
        with pytest.raises(KernelError, match="native"):
            layout.pack_bytes(case.codes[0])


def registry_torch():
    return (registry.Kernel("torch", "", -1, True, ""),)


@pytest.mark.skipif(library() is None, reason="the native library is not built")
class TestOperators:
    def arguments(self, case: Case):
        name = kernels.available()[0].name
        groups, prefix = case.groups, 2
        signs = torch.ones(groups * 8)
        case.prepared = CpuGroup([case.matrix], case.books, Rotation.make(groups * 8), prefix)
        job = case.prepared.job  # holds the tensors whose addresses the operator is given
        planes, books = case.matrix.data(prefix), list(case.books.prepared[:prefix])
        drop, span = torch.ops.dropbydrop, (3, 40, torch.bfloat16, name)
        if case.kind == "bytes":
            decode = {drop.decode: (planes, True, books, case.scales, case.rows, groups, *span)}
        else:
            decode = {drop.decode_trellis: (planes, books, case.scales, case.d_in, *span)}
        return decode | {
            drop.rotate: (case.x, signs, None, groups * 8, name),
            drop.prepared_group: (case.x, job.job, job.width, job.kernel),
            drop.rows: (case.x, torch.ones(9, groups * 8, dtype=torch.int8), torch.ones(9), name),
        }

    @pytest.mark.parametrize("kind", KINDS)
    def test_fake_implementations_agree(self, kind):
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        case = Case(70, 16, 2, n=2, kind=kind)
        for operator, arguments in self.arguments(case).items():
            torch.library.opcheck(operator.default, arguments, test_utils=tests)

    def test_refuses_a_job_that_is_none(self):
        with pytest.raises(RuntimeError, match="input group job"):
            ops.prepared_group(torch.zeros(1, 8), torch.zeros(200, dtype=torch.uint8), 64, 0)

    def test_luts_do_not_depend_on_the_precision(self, kernel):
        """The look-up tables of P planes begin with those of fewer: all levels share them."""
        native_only(kernel)
        case = Case(8, 140, 3)
        long, short = lut(case, 3, kernel), lut(case, 2, kernel)
        size = len(registry_group_bytes(short, 140, 2))
        assert torch.equal(long[:, :size], short[:, :size])

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", KINDS)
    def test_compile_sees_one_graph(self, kind):
        case = Case(70, 16, 2, n=1, kind=kind)
        prepared_matrix = CpuGroup([case.matrix, case.matrix], case.books, Rotation.make(128), 2)
        compiled = torch.compile(
            lambda x: [y * 2 for y in prepared_matrix(x)], fullgraph=True, backend="aot_eager"
        )
        for got, want in zip(compiled(case.x), prepared_matrix(case.x), strict=True):
            assert torch.equal(got, want * 2)

    def test_more_inputs_than_sums_can_hold(self, monkeypatch):
        monkeypatch.setattr(ops, "TRELLIS_INPUTS", 120)
        case = Case(70, 16, 2, kind="trellis")
        group = CpuGroup([case.matrix], case.books, Rotation(128, 1, torch.ones(128), None), 2)
        assert group.job is None
        assert relative(group(case.x)[0], case.exact(2)) < 1e-5

    def test_a_tensor_of_another_device_is_no_address(self):
        case = Case(70, 16, 2, n=1)
        group = CpuGroup([case.matrix], case.books, Rotation(128, 1, torch.ones(128), None), 2)
        if group.job is None:
            pytest.skip("no native kernel here")
        with pytest.raises(KernelError, match="these are on meta"):
            group(case.x.to("meta"))

    def test_export(self):
        case = Case(70, 16, 2, n=1)
        name = kernels.available()[0].name

        class Module(torch.nn.Module):
            def forward(self, x, p1, p2, b1, b2, scales, signs):
                weight = torch.ops.dropbydrop.decode(
                    [p1, p2], True, [b1, b2], scales, 70, 16, 0, 70, torch.float32, name
                )
                rotated = torch.ops.dropbydrop.rotate(x, signs, None, 1, name)
                return torch.nn.functional.linear(rotated, weight)

        signs = torch.ones(128)
        arguments = (case.x, *case.matrix.data(2), *case.books.prepared, case.scales, signs)
        program = torch.export.export(Module(), arguments)
        group = CpuGroup([case.matrix], case.books, Rotation(128, 1, signs, None), 2)
        assert torch.equal(program.module()(*arguments), group.dense(case.x)[0])


def lut(case: Case, prefix: int, kernel: str) -> Tensor:
    """Look-up tables of the first planes, uint8 [n, bytes], by the native library alone."""
    lib, index = library(), registry.index(kernel)
    n, entries = case.x.shape[0], case.books.lut_entries
    out = torch.empty(n, lib.drop_lut_bytes(index, case.groups, prefix, entries), dtype=torch.uint8)
    books = ops.pointers(case.books.prepared[:prefix])
    ops.check_status(
        lib.drop_build_lut(
            index, case.x.data_ptr(), n, case.groups, prefix, books, out.data_ptr(), 1
        )
    )
    return out


def registry_group_bytes(tables: Tensor, groups: int, prefix: int) -> range:
    """Bytes of the entries, without the steps at the end (one float32 a plane and block)."""
    steps = prefix * -(-groups // 64) * 4
    row = tables.shape[1]
    per_group = (row - steps) // (groups * prefix) // 128 * 128
    return range(per_group * groups * prefix)


def build_and_run(folder: Path, options: list[str], launcher: list[str]) -> str:
    """Configure, build and run the native test program, with and without faster variants of a
    kernel; its output."""
    configure = ["cmake", "-S", str(NATIVE), "-B", str(folder), "-DDROPBYDROP_TESTS=ON", *options]
    for command in (
        configure,
        ["cmake", "--build", str(folder), "--target", "test_kernels", "--parallel", "2"],
        ["env", "DROPBYDROP_FASTER=0", *launcher, str(folder / "test_kernels")],
        [*launcher, str(folder / "test_kernels")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
class TestNativeProgram:
    @pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
    def test_memory_and_undefined_behaviour(self, tmp_path):
        out = build_and_run(tmp_path, ["-DDROPBYDROP_SANITIZE=address,undefined"], [])
        assert "all kernels ok" in out

    @pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
    def test_races(self, tmp_path):
        """Workers share the same work on every instruction set: the portable one shows races."""
        options = ["-DDROPBYDROP_SANITIZE=thread", "-DDROPBYDROP_PORTABLE=ON"]
        out = build_and_run(tmp_path, options, [])
        assert "portable         ok" in out
        assert "all kernels ok" in out

    def test_neon_under_emulation(self, tmp_path):
        compiler = shutil.which("aarch64-linux-gnu-g++")
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if not compiler or not emulator:
            pytest.skip("needs g++-aarch64-linux-gnu and qemu-user (Debian packages)")
        out = build_and_run(
            tmp_path,
            [
                f"-DCMAKE_CXX_COMPILER={compiler}",
                "-DCMAKE_SYSTEM_NAME=Linux",
                "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            ],
            [emulator, "-L", "/usr/aarch64-linux-gnu"],
        )
        assert "neon             ok" in out
        assert "neon-u8          ok" in out

    def test_installs_without_a_compiler(self, tmp_path):
        tools = tmp_path / "bin"
        tools.mkdir()
        for tool in ("cmake", "make", "ninja", "uname"):
            if path := shutil.which(tool):
                (tools / tool).symlink_to(path)
        environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
        build = str(tmp_path / "build")
        for command in (["-S", str(NATIVE), "-B", build], ["--build", build], ["--install", build]):
            done = subprocess.run(
                ["cmake", *command],
                env={**environment, "PATH": str(tools)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            if command[0] == "-S":
                assert "No C++ compiler found" in done.stderr
