"""What surrounds the GPU kernels: operators, models, choice of a kernel; on Triton's interpreter.

The products themselves are in test_kernels.py, the same tests as for the CPU's kernels.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_kernels import Case, device
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP

import dropbydrop
from dropbydrop import kernels
from dropbydrop.coding.code import decode
from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.rotation import Rotation, hadamard_on
from dropbydrop.kernels import cuda as gpu
from dropbydrop.kernels import registry
from dropbydrop.kernels.cuda import int8, ops
from dropbydrop.runtime import fused_groups as together
from dropbydrop.runtime.int8_modules import NestedHead
from dropbydrop.system.errors import KernelError
from tiny import write_checkpoint

triton_row = next(row for row in registry.table() if row.name == "triton")
needs_triton = pytest.mark.skipif(
    not triton_row.supported, reason=f"the kernel triton cannot run: {triton_row.reason}"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def matrix_of(case: Case, bias=None, kernel: str = "triton") -> kernels.Matrix:
    at = device(kernel)
    return kernels.Matrix(
        case.stored(at), case.scales.to(at), None if bias is None else bias.to(at)
    )


def group_of(case: Case, prefix: int, bias=None, kernel: str = "triton", more=()) -> gpu.CudaGroup:
    """The matrix of a case, and those of `more`, with the codebooks of the first."""
    at = device(kernel)
    matrices = [matrix_of(case, bias, kernel), *(matrix_of(c, None, kernel) for c in more)]
    books = kernels.prepare_codebooks(case.set)
    rotation = Rotation.make(case.groups * 8, seed=1)
    rotation = rotation.scale(torch.rand(case.groups * 8) + 0.5).to(at)
    return gpu.CudaGroup(matrices, books, rotation, prefix, kernel)


class Launches:
    """Stands in for the Triton kernels and notes the names of those that are launched."""

    def __init__(self):
        self.names, self._kernels = [], ops._triton()

    def __getattr__(self, name):
        launches, kernel = self, getattr(self._kernels, name)

        class Launch:
            def __getitem__(self, grid):
                launches.names.append(name)
                return kernel[grid]

        return Launch()


@needs_triton
class TestOperators:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rotation(self, dtype):
        """Every factor: small, padded and full tiles, an odd factor, blocks."""
        for d, block in ((8, 0), (24, 0), (576, 0), (2048, 0), (8192, 0), (96, 16), (96, 1)):
            rotation = Rotation.make(d, seed=d)
            if block:
                rotation = replace(rotation, block=block, odd=None)
            if d % 3 == 0:
                rotation = rotation.scale(torch.rand(d) * 3 + 0.2)
            rotation = rotation.to(device("triton"))
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
        input_group = group_of(case, 2)
        rotated = input_group.rotation.apply(case.x.to(device("triton")).double()).cpu()
        error = (input_group(case.x.to(device("triton")))[0].cpu() - case.exact(2, rotated)).norm()
        assert error < 1e-5 * case.exact(2, rotated).norm()

    @pytest.mark.parametrize("prefix", range(1, 9) if torch.cuda.is_available() else (1, 4, 8))
    def test_few_rows_and_many_agree(self, prefix):
        """The two ways through an input group, at every prefix and in both 16-bit types."""
        case = Case(45, 21, 8, n=20)
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            input_group = group_of(case, prefix, case.bias)
            x = case.x.to(device("triton"), dtype)
            many, few = input_group(x)[0], input_group(x[:5])[0]
            assert many.dtype == few.dtype == dtype
            exact = (
                case.exact(prefix, input_group.rotation.apply(x.double()).cpu())
                + case.bias.double()
            )
            assert (many.cpu().double() - exact).norm() < limit * exact.norm()
            assert (few.cpu().double() - exact[:5]).norm() < limit * exact[:5].norm()

    def test_fakes_tell_the_shapes(self):
        case = Case(6, 4, 2)
        at = device("triton")
        planes = [plane.to(at) for plane in case.codes]
        tables, scales = gpu.device_entries(case.tables, at), case.scales.to(at)
        x, input_group = torch.randn(3, 32, device=at), group_of(case, 2)
        rotation = Rotation.make(32, seed=0).to(at)
        weight = torch.ones(5, 32, dtype=torch.int8, device=at)
        calls = {
            "gpu_decode": (planes, tables, scales, torch.bfloat16, "triton"),
            "gpu_group": (x.half(), input_group.number, input_group.width),
            "gpu_rotate": (x, rotation.signs, None, 32, torch.float16),
            "gpu_rows": (x, weight, scales[:5], None),
        }
        for name, arguments in calls.items():
            operator = getattr(torch.ops.dropbydrop, name).default
            torch.library.opcheck(
                operator, arguments, test_utils=("test_schema", "test_faketensor")
            )

    def test_one_graph(self):
        """torch.compile sees a group as operators: no breaks, nothing copied from the CPU."""
        case = Case(24, 6, 3, n=2)
        input_group = group_of(case, 3)
        x = case.x.to(device("triton"))
        graphs = []

        def record(graph, inputs):
            graphs.append((graph, inputs))
            return graph.forward

        compiled = torch.compile(lambda x: input_group(x)[0], backend=record, fullgraph=True)
        assert torch.equal(compiled(x), input_group(x)[0])
        ((graph, inputs),) = graphs
        called = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
        assert "dropbydrop.gpu_group" in called
        assert len(inputs) == 1, "planes are no inputs: a graph would copy them"

    def test_what_the_dense_path_passes_never_moves(self):
        """Else torch's CUDA graphs copy it before every replay."""
        input_group = group_of(Case(24, 6, 3), 2)
        for tensor in (
            *input_group.planes[0],
            input_group.tables,
            input_group.rotation.signs,
            input_group.rotation.odd,
        ):
            assert tensor._dynamo_static_input_type

    def test_a_site_that_is_gone_is_an_error(self):
        case = Case(24, 6, 2)
        number = group_of(case, 2).number
        with pytest.raises(KernelError, match="compile the model again"):
            torch.ops.dropbydrop.gpu_group(case.x.to(device("triton")), number, 24)

    @pytest.mark.parametrize("prefix", [1, 8])
    def test_matrices_of_a_site(self, prefix):
        """Up to three share a launch, further ones take another; biases of some."""
        cases = [Case(rows, 45, 8, n=2, seed=rows) for rows in (70, 5, 32, 33)]
        for case in cases[1:]:
            case.set = cases[0].set
        for count in (2, 3, 4):
            input_group = group_of(cases[0], prefix, cases[0].bias, more=cases[1:count])
            x = cases[0].x.to(device("triton"))
            rotated = input_group.rotation.apply(x.double()).cpu()
            products = input_group(x)
            assert len(products) == count
            for i, (y, case) in enumerate(zip(products, cases, strict=False)):
                want = case.exact(prefix, rotated) + (case.bias if i == 0 else 0)
                assert y.shape == want.shape
                assert (y.cpu() - want).norm() < 1e-5 * want.norm()
            for y, dense in zip(products, input_group.dense(x), strict=True):
                assert (y - dense).abs().max() < 1e-4 * dense.abs().max()

    def test_launches(self, monkeypatch):
        """What docs/gpu.md says: two an input group, three where the inputs are split, also with an
        odd factor and for several matrices."""
        launches = Launches()
        monkeypatch.setattr(ops, "_triton", lambda: launches)
        q, k, v = (Case(rows, 24, 2, n=16) for rows in (64, 8, 8))
        wide = Case(8, 8 * ops._GROUPS, 2)
        for case, more, want in (
            (q, (k, v), ["mix", "product"]),
            (wide, (), ["mix", "product", "finish"]),
        ):
            input_group = group_of(case, 2, more=more)
            launches.names.clear()
            input_group(case.x.to(device("triton")))
            assert launches.names == want
        assert group_of(q, 2).rotation.odd is not None

    def test_splits_cover_the_inputs(self):
        for tiles in (1, 16, 128, 896):
            for groups in (1, 72, 512, 3584):
                count, length = ops.splits(tiles, groups)
                assert count * length >= groups > (count - 1) * length
                assert length % ops._GROUPS == 0
        assert ops.splits(128, 512)[0] > 1
        assert ops.splits(ops._PROGRAMS, 3584)[0] == 1

    def test_training_decodes_again_instead_of_keeping(self):
        case = Case(40, 16, 2, n=3)
        input_group = group_of(case, 2)
        x = case.x.to(device("triton")).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t
        ):
            y = input_group(x)[0]
        assert torch.Size((40, 128)) not in kept
        y.sum().backward()
        dense = input_group.rotation.transpose(case.weight(2).to(x.device))
        assert (x.grad - dense.sum(0)).abs().max() < 1e-4 * dense.sum(0).abs().max()

    def test_refuses(self):
        case = Case(70, 8, 2, n=17)
        input_group = group_of(case, 2)
        planes, scales = input_group.planes[0], input_group.matrices[0].scales
        x = case.x.to(scales.device)
        with pytest.raises(ValueError, match="at most 16 rows of 64"):
            ops.product(x, [planes], input_group.tables, scales, None)
        with pytest.raises(ValueError, match="need 1 to 8"):
            ops.product(x[:1], [planes], input_group.tables[:1], scales, None)
        with pytest.raises(ValueError, match="3 matrices"):
            ops.product(x[:1], [planes] * 4, input_group.tables, scales, None)
        with pytest.raises(ValueError, match="uint8"):
            ops.decode([planes[0].float()], input_group.tables, scales, torch.float32, "triton")
        packed = tuple(replace(plane, packed=True) for plane in case.stored())
        books = kernels.prepare_codebooks(case.set)
        with pytest.raises(KernelError, match="as stored"):
            gpu.CudaGroup(
                [kernels.Matrix(packed, scales)],
                books,
                input_group.rotation,
                2,
                "triton",
            )
        with pytest.raises(KernelError, match="read"):
            kernels.CpuGroup([input_group.matrices[0]], books, input_group.rotation, 2, "triton")


@needs_triton
def test_a_model_runs_on_the_kernel(tmp_path, monkeypatch):
    """Logits of a prompt (dense path) and of single tokens (few rows) with the kernel by name."""
    folder = write_checkpoint(tmp_path / "out")
    ids = torch.randint(3, 259, (1, 24))
    with torch.no_grad():
        want = dropbydrop.load(folder, bits=3)(ids).logits
        monkeypatch.setenv(registry.VARIABLE, "triton")
        model = dropbydrop.load(folder, bits=3, device=device("triton"))
        called = []
        original = gpu.CudaGroup.__call__
        monkeypatch.setattr(
            gpu.CudaGroup, "__call__", lambda self, x: called.append(x.shape) or original(self, x)
        )
        got = model(ids.to(model.device)).logits.cpu()
        assert len(called) == 4 * len(model.model.layers), "q/k/v and gate/up go together"
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
        short = model(ids[:, :4].to(model.device)).logits.cpu()
        assert (short - want[:, :4]).abs().max() < 2e-3 * want.abs().max()
        two = dropbydrop.view(model, 2)
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


@pytest.fixture
def on_device(tmp_path, monkeypatch):
    """A tiny model whose products run on the kernel triton."""
    if device("triton") == "cpu":
        monkeypatch.setenv(registry.VARIABLE, "triton")
    folder = write_checkpoint(tmp_path / "out")
    return dropbydrop.load(folder, bits=2, device=device("triton"))


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_decoded_token_is_one_graph(on_device, backend):
    """What transformers compiles for a static cache: the whole model, without breaks."""
    model = on_device
    graphs, ids = [], torch.randint(3, 259, (1, 6)).to(model.device)
    with torch.no_grad():

        def token(run):
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(ids[:, :5], past_key_values=cache)
            return run(ids[:, 5:], past_key_values=cache).logits

        def record(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        want = token(model)
        got = token(torch.compile(model.forward, backend=record, fullgraph=True))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()  # attention in another order
    targets = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert sum("gpu_group" in target for target in targets) == 4 * len(model.model.layers)
    assert not any("gpu_decode" in target for target in targets)


@needs_triton
def test_generation_with_a_static_cache(on_device):
    ids = torch.randint(3, 259, (1, 6)).to(on_device.device)
    few = on_device.device.type == "cpu"  # under the interpreter a token takes seconds
    settings = {"max_new_tokens": 3 if few else 6, "do_sample": False}
    want = on_device.generate(ids, **settings)
    assert torch.equal(on_device.generate(ids, cache_implementation="static", **settings), want)


@needs_triton
class TestTogether:
    """q/k/v in one product (together.py)."""

    def calls(self, model, monkeypatch):
        """Numbers of matrices of the input groups that a prompt of two tokens is multiplied by."""
        seen, original = [], gpu.CudaGroup.__call__

        def spy(self, x):
            seen.append(len(self.rows))
            return original(self, x)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(gpu.CudaGroup, "__call__", spy)
            logits = model(torch.tensor([[5, 6]], device=model.device)).logits
        return seen[: len(seen) // 2], logits  # of the first of two equal blocks

    def test_sites_are_multiplied_together(self, on_device, monkeypatch):
        seen, logits = self.calls(on_device, monkeypatch)
        assert seen == [3, 1, 2, 1]
        view = dropbydrop.view(on_device, 2)
        again, same = self.calls(view, monkeypatch)
        assert again == seen
        assert torch.equal(same, logits)
        assert type(on_device.model.layers[0].mlp).__name__ == "LlamaMLP"

    def test_what_is_not_plain_runs_alone(self, on_device, monkeypatch):
        _, want = self.calls(on_device, monkeypatch)
        hooked = []
        for layer in on_device.model.layers:
            layer.self_attn.k_proj.register_forward_hook(lambda m, x, y: hooked.append(m))
        seen, logits = self.calls(on_device, monkeypatch)
        assert seen == [1, 1, 1, 1, 2, 1]
        assert len(hooked) == 2
        assert (logits - want).abs().max() < 1e-4 * want.abs().max()

    def test_another_input_is_not_mixed_up(self, on_device, monkeypatch):
        """A parent that does not give the same tensor to all linears of an input group."""
        attention = on_device.model.layers[0].self_attn

        class Odd(torch.nn.Module):
            def forward(self, x):
                return self.q_proj(x), self.k_proj(2 * x), self.v_proj(x)

        parent = Odd()
        parent.q_proj, parent.k_proj, parent.v_proj = (
            attention.q_proj, attention.k_proj, attention.v_proj,
        )  # fmt: skip
        x = torch.randn(1, 2, attention.q_proj.in_features, device=on_device.device)
        with torch.no_grad():
            want = parent(x)
            together.multiply_together(parent)
            got = parent(x)
        assert type(parent) is not Odd
        for one, other in zip(want, got, strict=True):
            assert (one - other).abs().max() < 1e-5 * one.abs().max()

    def test_a_parent_that_calls_super_is_left_alone(self, on_device):
        class Calls(LlamaMLP):
            def forward(self, x):
                return super().forward(x)

        mlp = on_device.model.layers[0].mlp
        mlp.__class__ = Calls
        together.multiply_together(on_device)
        assert type(mlp) is Calls
        with torch.no_grad():
            assert mlp(torch.ones(1, 64, device=on_device.device)).shape == (1, 64)

    def test_models_elsewhere_stay_as_they_are(self, tmp_path):
        model = dropbydrop.load(write_checkpoint(tmp_path / "out"), bits=2)
        assert type(model.model.layers[0].mlp) is LlamaMLP


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
        for name in ("triton", "cuda-i8", "cuda-i16"):
            row = next(row for row in registry.table() if row.name == name)
            assert row.gpu
            assert not row.native
            assert row.supported or row.reason
        assert kernels.select(device="cpu").takes("cpu")
        assert not kernels.select(device="cpu").gpu
        assert kernels.select(device="meta").name == "torch"

    def test_a_kernel_of_another_device_is_refused(self):
        native = next((kernel for kernel in kernels.available() if kernel.native), None)
        if native is None:
            pytest.skip("no native kernel to refuse")
        with pytest.raises(KernelError, match=r"on cpu, these are on cuda.*choose one of.*torch"):
            kernels.select(native.name, "cuda")

    def test_without_triton_cuda_runs_on_torch(self, monkeypatch):
        monkeypatch.setattr(registry, "available", lambda: [registry.table()[-1]])
        assert registry._automatic("cuda", "bytes").name == "torch"

    def test_the_one_percent_kernel_gives_way(self, monkeypatch):
        """To Triton with many planes or what does not fit, unless it is named."""
        rows = [replace(row, supported=True) for row in registry.table() if not row.native]
        monkeypatch.delenv(registry.VARIABLE, raising=False)
        monkeypatch.setattr(registry, "available", lambda: rows)
        assert registry._automatic("cuda", "bytes").name == "cuda-i8"
        assert registry._automatic("cuda", "trellis").name == "cuda-i16"
        assert registry.fallbacks("cuda", "bytes", None) == ["cuda-i8", "triton", "torch"]
        assert registry.fallbacks("cuda", "trellis", None) == ["cuda-i16", "torch"]
        assert registry.fallbacks("cuda", "bytes", "cuda-i8") == []
        monkeypatch.setenv(registry.VARIABLE, "cuda-i8")
        assert registry.fallbacks("cuda", "bytes", None) == []
        monkeypatch.setattr(int8, "shared_memory", lambda device: int8._SHARED)
        small, large = Rotation.make(64, 0), Rotation(1 << 16, 1 << 16, torch.ones(1 << 16), None)
        assert gpu.takes("cuda-i8", small, 4)
        assert not gpu.takes("cuda-i8", small, 5)
        assert not gpu.takes("cuda-i8", large, 2)
        assert gpu.takes("cuda-i16", small, 8)
        assert not gpu.takes("cuda-i16", large, 2)
        assert gpu.takes("triton", large, 8)
        assert gpu.takes("torch", large, 8)

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
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} >= {
        "decode", "product", "mix", "visit", "rows", "forward", "trace",
    }  # fmt: skip
    assert not [one for one in found if one["spilled"]]
    assert all(one["shared"] <= 227 << 10 for one in found)
    for one in found:
        if one["kernel"] in ("product", "decode"):  # entries of 16 bytes, by way of the cache
            assert one["wide"] > one["constants"]["P"]
            assert not one["around"]


def test_importing_the_package_loads_no_gpu_software():
    # (torch itself looks for triton, and imports it where it finds it)
    ours = "{'dropbydrop.kernels.cuda.triton_kernels', 'dropbydrop.coding.search.triton'}"
    code = f"import sys, dropbydrop; sys.exit(bool({ours} & set(sys.modules)))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


KIND = {"triton": "bytes", "cuda-i8": "bytes", "cuda-i16": "trellis"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
class TestDevice:
    @pytest.mark.parametrize("kernel", ["triton", "cuda-i8", "cuda-i16"])
    def test_random_shapes_against_the_reference(self, kernel):
        """P = 1..8, both 16-bit types, odd rows and tails, on the device itself."""
        gen = torch.Generator().manual_seed(0)
        for prefix in range(1, 9):
            for dtype in (torch.bfloat16, torch.float16):
                d_out, groups, n = (
                    int(torch.randint(1, high, (1,), generator=gen)) for high in (700, 600, 17)
                )
                case = Case(d_out, groups, prefix, n=n, kind=KIND[kernel])
                input_group = group_of(case, prefix, kernel=kernel)
                x = case.x.cuda().to(dtype)
                exact = case.exact(prefix, input_group.rotation.apply(x.double()).cpu())
                error = (input_group(x)[0].cpu().double() - exact).norm() / exact.norm()
                assert error < (0.03 if kernel == "cuda-i8" else 0.01)

    @pytest.mark.parametrize("kernel", ["triton", "cuda-i8", "cuda-i16"])
    def test_graphs_replay_the_same_bits(self, kernel):
        case = Case(300, 72, 3, n=2, kind=KIND[kernel])
        input_group = group_of(case, 3, kernel=kernel)
        x = case.x.cuda().half()
        want = input_group(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = input_group(x)[0]
        graph.replay()
        assert torch.equal(got, want)

    @pytest.mark.parametrize("kernel", ["triton", "cuda-i8"])
    def test_decoding_is_exact(self, kernel):
        case = Case(333, 77, 8)
        at = "cuda"
        planes = [plane.to(at) for plane in case.codes]
        case.set = BytesSet.of([part[""].half() for part in case.set.parts])
        tables = gpu.device_entries(case.tables, at)
        for prefix in range(1, 9):
            for dtype in DTYPES:
                got = ops.decode(planes[:prefix], tables, case.scales.to(at), dtype, kernel).cpu()
                assert torch.equal(got, decode(case.codes, case.tables, case.scales, prefix, dtype))
