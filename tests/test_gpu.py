"""What surrounds the GPU kernels: operators, models, choice of a kernel; on Triton's interpreter.

The products themselves are in test_kernels.py, the same tests as for the CPU's kernels.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dropbydrop
from dropbydrop import kernels
from dropbydrop.code import decode
from dropbydrop.errors import KernelError
from dropbydrop.kernels import gpu, layout, registry
from dropbydrop.kernels.gpu import ops
from dropbydrop.linear import NestedHead, NestedLinear
from dropbydrop.rotation import Rotation, hadamard_on
from helpers import write_checkpoint
from test_kernels import Case, device

triton_row = next(row for row in registry.table() if row.name == "triton")
needs_triton = pytest.mark.skipif(
    not triton_row.supported, reason=f"the kernel triton cannot run: {triton_row.reason}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def site_of(case: Case, prefix: int, bias=None, kernel: str = "triton") -> gpu.DeviceSite:
    at = device(kernel)
    planes = tuple(plane.to(at) for plane in case.codes)
    packed = layout.Packed(planes, case.rows, case.groups, False)
    matrix = kernels.Matrix(packed, case.scales.to(at), None if bias is None else bias.to(at))
    tables = gpu.device_tables(case.tables, at)
    rotation = Rotation.make(case.groups * 8, seed=1).to(at)
    return gpu.DeviceSite([matrix], tables, rotation, prefix, kernel)


@needs_triton
class TestOperators:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rotation(self, dtype):
        """Every factor: small, padded and full tiles, an odd factor, blocks."""
        cases = [(8, "full", None), (24, "full", None), (576, "full", None), (2048, "full", None)]
        for d, kind, block in [*cases, (96, "block", 16), (8192, "block", 8192)]:
            rotation = Rotation.make(d, kind, block, seed=d).to(device("triton"))
            assert ops.rotates(rotation)
            x = torch.randn(2, d).to(device("triton"), dtype)
            got = torch.ops.dropbydrop.gpu_rotate(
                x, rotation.signs, rotation.odd, rotation.block, torch.float32
            )
            want = rotation.apply(x.double())
            assert (got - want).abs().max() < 1e-5 * want.abs().max() + 1e-6

    def test_rotations_that_go_through_torch(self):
        odd = 2 * 131
        assert not ops.rotates(Rotation.make(odd * 4, seed=0))
        case = Case(9, odd // 2, 2, n=3)
        site = site_of(case, 2)
        rotated = site.rotation.apply(case.x.to(device("triton")).double()).cpu()
        error = (site(case.x.to(device("triton")))[0].cpu() - case.exact(2, rotated)).norm()
        assert error < 1e-5 * case.exact(2, rotated).norm()

    @pytest.mark.parametrize("prefix", range(1, 9))
    def test_few_rows_and_many_agree(self, prefix):
        """The two ways through a site, at every prefix and in both 16-bit types."""
        case = Case(45, 21, 8, n=20)
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            site = site_of(case, prefix, case.bias)
            x = case.x.to(device("triton"), dtype)
            many, few = site(x)[0], site(x[:5])[0]
            assert many.dtype == few.dtype == dtype
            exact = case.exact(prefix, site.rotation.apply(x.double()).cpu()) + case.bias.double()
            assert (many.cpu().double() - exact).norm() < limit * exact.norm()
            assert (few.cpu().double() - exact[:5]).norm() < limit * exact[:5].norm()

    def test_fakes_tell_the_shapes(self):
        case = Case(6, 4, 2)
        at = device("triton")
        planes = [plane.to(at) for plane in case.codes]
        tables, scales = gpu.device_tables(case.tables, at), case.scales.to(at)
        x = torch.randn(3, 32, device=at)
        rotation = Rotation.make(32, seed=0).to(at)
        weight = torch.ones(5, 32, dtype=torch.int8, device=at)
        calls = {
            "gpu_decode": (planes, tables, scales, torch.bfloat16),
            "gpu_product": (x.half(), planes, tables, scales, None),
            "gpu_rotate": (x, rotation.signs, None, 32, torch.float16),
            "gpu_rows": (x, weight, scales[:5], None),
        }
        for name, arguments in calls.items():
            operator = getattr(torch.ops.dropbydrop, name).default
            torch.library.opcheck(
                operator, arguments, test_utils=("test_schema", "test_faketensor")
            )

    def test_one_graph(self):
        """torch.compile sees a site as operators: no breaks, nothing copied from the CPU."""
        case = Case(24, 6, 3, n=2)
        site = site_of(case, 3)
        x = case.x.to(device("triton"))
        graphs = []

        def record(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(lambda x: site(x)[0], backend=record, fullgraph=True)
        assert torch.equal(compiled(x), site(x)[0])
        called = {str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"}
        assert {"dropbydrop.gpu_rotate", "dropbydrop.gpu_product"} <= called
        assert len(graphs) == 1

    def test_splits_cover_the_inputs(self):
        for d_out in (1, 512, 4096, 28672):
            for groups in (1, 72, 512, 3584):
                count, length = ops.splits(d_out, groups)
                assert count * length >= groups > (count - 1) * length
                assert length % ops._GROUPS == 0
        assert ops.splits(4096, 512)[0] > 1

    def test_training_decodes_again_instead_of_keeping(self):
        case = Case(40, 16, 2, n=3)
        site = site_of(case, 2)
        x = case.x.to(device("triton")).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t
        ):
            y = site(x)[0]
        assert torch.Size((40, 128)) not in kept
        y.sum().backward()
        dense = site.rotation.inverse(case.weight(2).to(x.device))
        assert (x.grad - dense.sum(0)).abs().max() < 1e-4 * dense.sum(0).abs().max()

    def test_refuses(self):
        case = Case(70, 8, 2, n=17)
        site = site_of(case, 2)
        planes, scales = site.planes[0], site.matrices[0].scales
        x = case.x.to(scales.device)
        with pytest.raises(ValueError, match="at most 16 rows of 64"):
            ops.product(x, planes, site.tables, scales, None)
        with pytest.raises(ValueError, match="need 1 to 8"):
            ops.product(x[:1], planes, site.tables[:1], scales, None)
        with pytest.raises(ValueError, match="uint8"):
            ops.decode([planes[0].float()], site.tables, scales, torch.float32)
        packed = layout.Packed(tuple(planes), 70, 8, True)
        with pytest.raises(KernelError, match="row major"):
            gpu.DeviceSite(
                [kernels.Matrix(packed, scales)], site.tables, site.rotation, 2, "triton"
            )
        books = kernels.prepare_codebooks(case.tables, True)
        with pytest.raises(KernelError, match="read"):
            kernels.Bound([site.matrices[0]], books, site.rotation, 2, "triton")


@needs_triton
def test_a_model_runs_on_the_kernel(tmp_path, monkeypatch):
    """Logits of a prompt (dense path) and of single tokens (few rows) with the kernel by name."""
    folder = write_checkpoint(tmp_path / "out")
    ids = torch.randint(3, 259, (1, 24))
    with torch.no_grad():
        want = dropbydrop.load(folder, bits=3)(ids).logits
        if device("triton") == "cpu":
            monkeypatch.setenv(registry.VARIABLE, "triton")
        model = dropbydrop.load(folder, bits=3, device=device("triton"))
        called = []
        original = gpu.DeviceSite.__call__
        monkeypatch.setattr(
            gpu.DeviceSite, "__call__", lambda self, x: called.append(x.shape) or original(self, x)
        )
        got = model(ids.to(model.device)).logits.cpu()
        assert len(called) == sum(isinstance(m, NestedLinear) for m in model.modules())
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
        short = model(ids[:, :4].to(model.device)).logits.cpu()
        assert (short - want[:, :4]).abs().max() < 2e-3 * want.abs().max()
        two = dropbydrop.at(model, 2)
        assert not torch.equal(two(ids.to(model.device)).logits.cpu(), got)


@needs_triton
def test_a_module_is_one_graph(tmp_path, monkeypatch):
    """What transformers compiles for a static cache: a linear layer, without breaks."""
    if device("triton") == "cpu":
        monkeypatch.setenv(registry.VARIABLE, "triton")
    at = device("triton")
    model = dropbydrop.load(write_checkpoint(tmp_path / "out"), bits=2, device=at)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.randn(1, 1, layer.in_features, device=at)
    with torch.no_grad():
        want = layer(x)  # the prompt runs first and builds what all calls share
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), want)


@needs_triton
def test_the_head_reads_eight_bits(tmp_path, monkeypatch):
    """Few rows go through the operator on bytes; its result is that of the dense product."""
    model = dropbydrop.load(write_checkpoint(tmp_path / "out"), bits=2)
    head = next(m for m in model.modules() if isinstance(m, NestedHead))
    x = torch.randn(2, 3, head.in_features)
    want = head(x)
    monkeypatch.setenv(registry.VARIABLE, "triton")
    if device("triton") == "cuda":
        head, x = head.cuda(), x.cuda()
    calls = []
    monkeypatch.setattr(gpu, "rows_linear", spied(gpu.rows_linear, calls))
    assert (head(x).cpu() - want).abs().max() < 1e-4 * want.abs().max()
    assert len(calls) == 1


def spied(function, calls):
    def wrapped(*args):
        calls.append(args)
        return function(*args)

    return wrapped


class TestChoice:
    def test_nothing_is_chosen_for_the_wrong_device(self):
        for name in ("triton", "cuda-i8"):
            row = next(row for row in registry.table() if row.name == name)
            assert row.gpu
            assert not row.native
            assert row.supported or row.reason
        assert kernels.select(device="cpu").takes("cpu")
        assert not kernels.select(device="cpu").gpu
        assert kernels.select(device="meta").name == "torch"

    def test_a_kernel_of_another_device_is_refused(self):
        native = kernels.available()[0]
        if native.name == "torch":
            pytest.skip("no native kernel to refuse")
        with pytest.raises(KernelError, match=r"on cpu, these are on cuda.*choose one of.*torch"):
            kernels.select(native.name, "cuda")

    def test_without_triton_cuda_runs_on_torch(self, monkeypatch):
        monkeypatch.setattr(registry, "available", lambda: [registry.table()[-1]])
        assert registry._automatic("cuda").name == "torch"

    def test_the_one_percent_kernel_is_never_chosen(self, monkeypatch):
        rows = [
            registry.Kernel("cuda-i8", "", -1, True, "", "cuda"),
            registry.Kernel("triton", "", -1, True, "", "cuda"),
            registry.table()[-1],
        ]
        monkeypatch.setattr(registry, "available", lambda: rows)
        assert registry._automatic("cuda").name == "triton"

    def test_hadamard_factors_are_copied_once(self):
        where = torch.device("cpu")
        assert hadamard_on(16, where) is hadamard_on(16, where)
        with torch.inference_mode():
            factor = hadamard_on(2, where, torch.float64)
        assert not factor.is_inference()


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
def test_compiles_for_a_gpu_without_one():
    """Every Triton kernel through its compiler to machine code, in a fresh process."""
    script = Path(__file__).parent / "compile_triton.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


def test_importing_the_package_loads_no_gpu_software():
    # (torch itself looks for triton, and imports it where it finds it)
    ours = "{'dropbydrop.kernels.gpu.triton_kernels', 'dropbydrop.search.triton_beam'}"
    code = f"import sys, dropbydrop; sys.exit(bool({ours} & set(sys.modules)))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
class TestDevice:
    @pytest.mark.parametrize("kernel", ["triton", "cuda-i8"])
    def test_random_shapes_against_the_reference(self, kernel):
        """P = 1..8, both 16-bit types, odd rows and tails, on the device itself."""
        gen = torch.Generator().manual_seed(0)
        for prefix in range(1, 9):
            for dtype in (torch.bfloat16, torch.float16):
                d_out, groups, n = (
                    int(torch.randint(1, high, (1,), generator=gen)) for high in (700, 600, 17)
                )
                case = Case(d_out, groups, prefix, n=n)
                site = site_of(case, prefix, kernel=kernel)
                x = case.x.cuda().to(dtype)
                exact = case.exact(prefix, site.rotation.apply(x.double()).cpu())
                error = (site(x)[0].cpu().double() - exact).norm() / exact.norm()
                assert error < (0.03 if kernel == "cuda-i8" else 0.01)

    @pytest.mark.parametrize("kernel", ["triton", "cuda-i8"])
    def test_graphs_replay_the_same_bits(self, kernel):
        case = Case(300, 72, 3, n=2)
        site = site_of(case, 3, kernel=kernel)
        x = case.x.cuda().half()
        want = site(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = site(x)[0]
        graph.replay()
        assert torch.equal(got, want)

    def test_decoding_is_exact(self):
        case = Case(333, 77, 8)
        at = "cuda"
        planes = [plane.to(at) for plane in case.codes]
        tables = gpu.device_tables(case.tables, at)
        for prefix in range(1, 9):
            for dtype in DTYPES:
                got = ops.decode(planes[:prefix], tables, case.scales.to(at), dtype).cpu()
                assert torch.equal(got, decode(case.codes, case.tables, case.scales, prefix, dtype))
