"""Loading at a precision, views on the same storage, and the modules behind them."""

from __future__ import annotations

import copy
import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

import dropbydrop
from dropbydrop import kernels
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.int8_modules import NestedEmbedding, NestedHead
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.runtime.views import store_of
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from tiny import (
    COUNTS,
    VOCAB,
    decoded_reference,
    save_tiny,
    tiny_llama,
    tiny_model,
    write_checkpoint,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IDS = torch.randint(3, VOCAB, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("views") / "out", code=code)


@pytest.fixture(scope="module")
def model(out: Path) -> Any:
    """The whole checkpoint in memory; tests must not change it, which one of them checks."""
    return dropbydrop.load(out)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# ---------------------------------------------------------------------------------- loading

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "head in 16 bits": ({}, {"embedding_bits": 16}),
    "untied head": ({"tie_word_embeddings": False}, {}),
    "untied head in 16 bits": ({"tie_word_embeddings": False}, {"embedding_bits": 16}),
    "head in planes": ({}, {"embedding_bits": (4, 5, 5)}),
    "untied head in planes": ({"tie_word_embeddings": False}, {"embedding_bits": (3, 3, 5)}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
    "256 entries": ({}, {"sign_symmetric": False}),
    "sharded planes": ({}, {"shard_bytes": 2000}),
    "trellis": ({}, {"code": "trellis"}),
    "trellis, biases": ({"attention_bias": True, "mlp_bias": True}, {"code": "trellis"}),
    "trellis, window 17": ({"tie_word_embeddings": False}, {"code": "trellis", "window": 17}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_the_decoded_weights(tmp_path: Path, variant: str) -> None:
    base_settings, settings = VARIANTS[variant]
    base = tiny_llama(**base_settings)
    if base.config.attention_bias:
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
    out = write_checkpoint(tmp_path / "out", base, **settings)
    whole = dropbydrop.load(out)
    seen = []
    for bits in (2, 3, 4):
        model = dropbydrop.load(out, bits=bits)
        assert dropbydrop.precision(model) == bits
        assert not model.training
        found, expected = logits(model), logits(decoded_reference(base, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, logits(dropbydrop.view(whole, bits)))
        seen.append(found)
    assert (seen[0] - seen[1]).abs().max() > 0.01 < (seen[1] - seen[2]).abs().max()


def naive_plane(checkpoint: Checkpoint, name: str, m: int) -> Tensor:
    """Plane m's part of W in rotated coordinates, before the row scales, one by one."""
    codes, spec = checkpoint.read_codes(name, m), checkpoint.quantization.planes[m - 1]
    part = checkpoint.read_set("universal").parts[m - 1]
    found = torch.zeros(checkpoint.shapes[name], dtype=torch.float64)
    for r, j in itertools.product(*map(range, found.shape)):
        if spec.kind == "bytes":
            code = int(codes[r, j // 8])
            found[r, j] = part[""][code & 127, j % 8].double() * (-1 if code & 128 else 1)
        else:
            newest, label = spec.bits * (r + 1) - 1, 0
            for age, tap in enumerate(part[".taps"].tolist()):
                i = (newest - age) % (8 * len(codes))
                label ^= tap * (int(codes[i // 8, j]) >> i % 8 & 1)
            found[r, j] = part[""][label].double() * part[".scale"].double()
    return found


def test_dense_weight_against_a_naive_decoder(out: Path, model: Any, code: str) -> None:
    """Entry by entry, with the dense matrix Q: W = scales * sum_m C_m[codes_m] Q."""
    checkpoint = Checkpoint.open(out)
    name = "model.layers.1.mlp.down_proj"  # d_in 96 = 32 * 3: the odd factor takes part
    input_group = checkpoint.quantization.group_index[name]
    rotation = checkpoint.read_rotation(input_group)
    assert (rotation.signs.abs() != 1).any()
    q = rotation.apply(torch.eye(96)).T.double()  # orthogonal up to the factors of its inputs
    torch.testing.assert_close(q.T @ q, rotation.signs.double().square().diag(), atol=1e-6, rtol=0)
    scales = checkpoint.read(f"{name}.scales").double()[:, None]
    planes = [naive_plane(checkpoint, name, m) for m in range(1, COUNTS[code][4] + 1)]
    for bits in (2, 4):
        rotated = torch.stack(planes[: COUNTS[code][bits]]).sum(0) * scales
        view = dropbydrop.view(model, bits)
        weight = view.get_submodule(name).dense_weight()
        torch.testing.assert_close(weight.double(), rotated @ q, atol=1e-5, rtol=0)


def test_reads_only_the_planes_it_needs(out: Path, tmp_path: Path, code: str) -> None:
    partial, lacking = Path(shutil.copytree(out, tmp_path / "partial")), COUNTS[code][3]
    (partial / f"plane-{lacking}.safetensors").unlink()
    (partial / f"plane-{lacking + 1}.safetensors").write_bytes(b"never looked at")
    two = dropbydrop.load(partial, bits=2)
    assert torch.equal(logits(two), logits(dropbydrop.load(out, bits=2)))
    codes = [name for name in two.state_dict() if ".codes." in name]
    assert {name.rpartition(".")[2] for name in codes} == set("12"[: lacking - 1])
    message = rf"plane {lacking} is needed, .* ask for a lower precision"
    with pytest.raises(MissingPlaneError, match=message):
        dropbydrop.load(partial)
    with pytest.raises(PrecisionError, match=r"precision 5 is not a level .* has 2, 3, 4"):
        dropbydrop.load(partial, bits=5)


def test_load_gives_an_ordinary_model(out: Path, tmp_path: Path) -> None:
    model = dropbydrop.load(out, bits=3)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert model.config.vocab_size == VOCAB
    assert model.config.quantization_config.bits == 3
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(["hello"], return_tensors="pt")
    texts = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert texts.shape == (1, batch.input_ids.shape[1] + 4)
    # with a cache and token by token, as by one forward pass over everything
    step = logits(model, texts[:, :-1]).argmax(-1)
    assert torch.equal(step[:, -4:], texts[:, -4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "bfloat16"])
def test_dtypes(out: Path, code: str, dtype: Any) -> None:
    model = dropbydrop.load(out, bits=3, dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == logits(model).dtype == expected
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in model.state_dict().items()}
    assert {kinds[m] for m in "123"[: COUNTS[code][3]]} == {torch.uint8}
    assert kinds["rows"] == torch.int8
    assert kinds["scales"] == kinds["row_scales"] == torch.float16
    assert kinds["weight"] == expected  # the norms
    exact = logits(dropbydrop.load(out, bits=3))
    error = (logits(model).float() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 0.04, torch.float16: 0.005}[expected]


def test_rotation_of_16_bit_activations_rounds_once(out: Path) -> None:
    """The product in bfloat16 is as exact as rounding x' and W' once allows."""
    model = dropbydrop.load(out, bits=4)
    module = model.model.layers[0].mlp.down_proj
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = module.rotated_weight()
    exact = module.input_group.rotation.apply(x.double()) @ weight.double().T
    once = F.linear(module.input_group.rotation.apply(x.float()).bfloat16(), weight.bfloat16())
    twice = F.linear(module.input_group.rotation.apply(x), weight.bfloat16())

    def error(y: Tensor) -> float:
        return float((y.double() - exact).square().mean())

    assert error(module(x)) <= 1.05 * error(once) < 0.9 * error(twice)


def test_16_bit_head_does_not_overflow() -> None:
    """127 * 8 * sqrt(d) exceeds float16; the logits themselves do not."""
    head = NestedHead(5, 2048, None, tied=False)
    head.rows = nn.Parameter(torch.full((5, 2048), 127, dtype=torch.int8), requires_grad=False)
    head.row_scales = torch.full((5,), 1e-3).half()
    y = head(torch.full((1, 2048), 1.0, dtype=torch.float16))
    torch.testing.assert_close(y.float(), torch.full((1, 5), 2048 * 0.127), rtol=2e-3, atol=0)


def test_a_large_head_goes_in_slabs(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    whole = logits(model)
    monkeypatch.setattr("dropbydrop.kernels.int8_head.HEAD_SLAB", 70)
    torch.testing.assert_close(logits(model), whole)


def test_nested_embedding(model: Any) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, NestedEmbedding)
    assert torch.equal(embedding(IDS), embedding.dense_weight()[IDS])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_load_to_a_gpu(out: Path) -> None:
    model = dropbydrop.load(out, bits=4, device="cuda")
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    for bits in (4, 2):
        expected = logits(dropbydrop.load(out, bits=bits))
        found = logits(dropbydrop.view(model, bits), IDS.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------ views


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def test_view_shares_every_byte_and_leaves_the_base_alone(out: Path, code: str) -> None:
    base = dropbydrop.load(out)
    before = logits(base)
    pointers = {name: t.data_ptr() for name, t in tensors(base).items()}
    config = base.config.to_json_string()
    view = dropbydrop.view(base, 2)
    assert dropbydrop.precision(view) == 2
    assert view.config.quantization_config.bits == 2
    found = tensors(view)
    above = tuple(f"codes.{m}" for m in range(COUNTS[code][2] + 1, 5))
    assert set(found) == {n for n in pointers if not n.endswith(above)}
    for name, tensor in found.items():
        assert tensor.data_ptr() == pointers[name], name
    assert torch.equal(logits(view), logits(dropbydrop.load(out, bits=2)))
    # the base: same tensors, same outputs, same precision, same config
    assert dropbydrop.precision(base) == 4
    assert {name: t.data_ptr() for name, t in tensors(base).items()} == pointers
    assert torch.equal(logits(base), before)
    assert base.config.to_json_string() == config
    # a view of a view, upwards again
    again = dropbydrop.view(view, 4)
    assert {name: t.data_ptr() for name, t in tensors(again).items()} == pointers
    assert torch.equal(logits(again), before)
    assert store_of(again) is store_of(base)


def test_moving_a_view_does_not_move_the_base(out: Path) -> None:
    base = dropbydrop.load(out)
    view = dropbydrop.view(base, 2)
    view.to(torch.bfloat16)
    view.model.norm.weight.data.zero_()
    assert base.dtype == torch.float32
    assert base.model.norm.weight.abs().min() > 0
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in view.state_dict().items()}
    assert kinds["scales"] == kinds["row_scales"] == torch.float16  # not rounded to bfloat16
    assert kinds["1"] == torch.uint8
    assert logits(dropbydrop.view(base, 2)).dtype == torch.float32
    # moved to another device (meta stands for it), the base stays and still works
    before = logits(base)
    other = dropbydrop.view(base, 3).to("meta")
    assert {t.device.type for t in other.state_dict().values()} == {"meta"}
    assert torch.equal(logits(base), before)


def test_a_load_opens_the_checkpoint_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config, manifest and headers are read and checked at every opening."""
    opened: list[Path] = []
    once = Checkpoint.open

    def count(path: Path | str, *settings: Any) -> Checkpoint:
        opened.append(Path(path))
        return once(path, *settings)

    monkeypatch.setattr(Checkpoint, "open", staticmethod(count))
    model = dropbydrop.load(out, bits=3)
    dropbydrop.load_planes(model, 4)
    dropbydrop.view(model, 4)
    assert opened == [out]


def test_casting_a_model(out: Path) -> None:
    exact = dropbydrop.load(out, bits=3, dtype=torch.bfloat16)
    cast = dropbydrop.load(out, bits=3).to(torch.bfloat16)
    expected = exact.state_dict()
    for name, tensor in cast.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert logits(cast).dtype == torch.bfloat16
    assert cast.get_input_embeddings()(IDS).dtype == torch.bfloat16


def test_precision_cannot_be_set(model: Any, code: str) -> None:
    module = model.model.layers[0].self_attn.q_proj
    assert module.prefix == COUNTS[code][4]
    with pytest.raises(PrecisionError, match=r"fixed at 4; .* dropbydrop.view\(model, 2\)"):
        module.prefix = 2
    with pytest.raises(PrecisionError, match=r"dropbydrop.view\(model, 2\)"):
        model.config.quantization_config.bits = 2
    assert dropbydrop.precision(model) == 4


def test_planes_that_are_not_in_memory(out: Path, code: str) -> None:
    base = dropbydrop.load(out, bits=2)
    before = {name: t.data_ptr() for name, t in tensors(base).items()}
    with pytest.raises(
        MissingPlaneError, match=r"dropbydrop.load_planes\(model, 4\), or load .*bits=4"
    ):
        dropbydrop.view(base, 4)
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        dropbydrop.view(base, 5)
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        dropbydrop.load_planes(base, 1)
    dropbydrop.load_planes(base, 3)
    three = dropbydrop.view(base, 3)
    assert torch.equal(logits(three), logits(dropbydrop.load(out, bits=3)))
    with pytest.raises(MissingPlaneError):
        dropbydrop.view(base, 4)
    dropbydrop.load_planes(three, 4)
    dropbydrop.load_planes(three, 2)  # already there: nothing to do
    assert torch.equal(logits(dropbydrop.view(base, 4)), logits(dropbydrop.load(out)))
    assert dropbydrop.precision(base) == 2  # views keep their prefix
    assert {name: t.data_ptr() for name, t in tensors(base).items()} == before
    one, other = (v.model.layers[0].mlp.up_proj for v in (dropbydrop.view(base, 4), three))
    m = COUNTS[code][3]
    assert one.codes[m].data_ptr() == other.codes[m].data_ptr()


def test_extend_to_a_plane_that_is_absent(out: Path, tmp_path: Path, code: str) -> None:
    partial, m = Path(shutil.copytree(out, tmp_path / "partial")), COUNTS[code][3]
    (partial / f"plane-{m}.safetensors").unlink()
    base = dropbydrop.load(partial, bits=2)
    with pytest.raises(MissingPlaneError, match=f"plane {m} is needed"):
        dropbydrop.load_planes(base, 4)
    assert store_of(base).loaded == m - 1
    shutil.copy(out / f"plane-{m}.safetensors", partial)  # it arrives
    dropbydrop.load_planes(base, 4)
    assert torch.equal(logits(dropbydrop.view(base, 4)), logits(dropbydrop.load(out)))


def test_two_threads_at_two_precisions(out: Path) -> None:
    base = dropbydrop.load(out)
    views = {bits: dropbydrop.view(base, bits) for bits in (2, 3, 4)}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 12}
    alone = {bits: view.generate(IDS, **settings) for bits, view in views.items()}
    assert not torch.equal(alone[2], alone[4])
    store_of(base)._derived.clear()  # let the threads build shared values at the same moment
    store_of(base).groups._found.clear()
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(bits: int) -> None:
        start.wait()
        for _ in range(4):
            if not torch.equal(views[bits].generate(IDS, **settings), alone[bits]):
                wrong.append(bits)

    def make_views() -> None:
        start.wait()
        for _ in range(4):
            for bits in (2, 3):
                if not torch.equal(
                    dropbydrop.view(base, bits).generate(IDS, **settings), alone[bits]
                ):
                    wrong.append(-bits)

    threads = [threading.Thread(target=work, args=(bits,)) for bits in (2, 4)]
    threads += [threading.Thread(target=make_views), threading.Thread(target=work, args=(3,))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_planes_arrive_while_a_view_generates(out: Path) -> None:
    base = dropbydrop.load(out, bits=2)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    alone = base.generate(IDS, **settings)
    results = []
    thread = threading.Thread(target=lambda: results.append(base.generate(IDS, **settings)))
    thread.start()
    dropbydrop.load_planes(base, 4)
    thread.join()
    assert torch.equal(results[0], alone)
    assert torch.equal(logits(dropbydrop.view(base, 4)), logits(dropbydrop.load(out)))


def test_sites_are_shared_values(model: Any) -> None:
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert (
        attention.q_proj.input_group is attention.k_proj.input_group is attention.v_proj.input_group
    )
    assert attention.q_proj.input_group is not attention.o_proj.input_group
    assert attention.q_proj.input_group.books is mlp.up_proj.input_group.books  # one codebook set
    assert (
        dropbydrop.view(model, 2).model.layers[0].self_attn.q_proj.input_group
        is attention.q_proj.input_group
    )


def test_derived_values_are_built_once(model: Any) -> None:
    store, built = store_of(model), []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        store.derived("test", lambda: built.append(1) or object())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_a_view_does_not_inherit_compiled_code(model: Any) -> None:
    base = dropbydrop.view(model, 3)
    base._compiled_call = lambda *a, **k: "compiled for 3 bits"
    assert not hasattr(dropbydrop.view(base, 2), "_compiled_call")
    assert base._compiled_call() == "compiled for 3 bits"


def test_copies_and_pickles(model: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)  # an ordinary deep copy: own tensors, the same store
    assert torch.equal(logits(twin), logits(model))
    assert store_of(twin) is store_of(model)
    view, name = dropbydrop.view(twin, 2), "model.layers.0.mlp.up_proj"
    twin.get_submodule(name).scales.mul_(2)  # whose own they are
    changed, below = logits(twin), logits(view)
    assert not torch.equal(changed, logits(model))
    again = copy.deepcopy(model)
    again.get_submodule(name).scales.mul_(2)
    assert torch.equal(logits(again), changed)
    assert not torch.equal(below, logits(dropbydrop.view(model, 2)))  # as a view shares them
    with pytest.raises(DropError, match="cannot be pickled"):
        torch.save(model, tmp_path / "model.pt")


def test_biases_may_change_and_have_any_type(tmp_path: Path, code: str) -> None:
    out = write_checkpoint(tmp_path / "out", tiny_model("qwen2"), code=code)
    model, name = dropbydrop.load(out), "model.layers.0.self_attn.q_proj.bias"
    first = logits(model)
    bias = model.get_parameter(name)
    for change in (
        lambda: bias.data.add_(1),
        lambda: model.load_state_dict({name: bias + 1}, strict=False, assign=True),
        lambda: model.load_state_dict({name: bias + 2}, strict=False),
    ):
        change()
        fresh = dropbydrop.load(out)
        fresh.get_parameter(name).data.copy_(model.get_parameter(name).data)
        assert torch.equal(logits(model), logits(fresh))
        assert not torch.equal(logits(model), first)
        assert torch.equal(tokens_of(model), tokens_of(fresh))
    wide = dropbydrop.load(out, dtype=torch.float64)
    torch.testing.assert_close(logits(wide).float(), first, rtol=1e-4, atol=1e-4)


def test_scales_may_be_replaced(tmp_path: Path, code: str) -> None:
    out = write_checkpoint(tmp_path / "out", tiny_model("qwen2"), code=code)
    model, other = dropbydrop.load(out), dropbydrop.load(out)
    first, said = logits(model), tokens_of(model)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        linear = model.get_submodule(name)
        linear.scales = linear.scales * 20
        other.get_submodule(name).scales.mul_(20)
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), first)
    assert torch.equal(tokens_of(model), tokens_of(other))
    assert not torch.equal(tokens_of(model), said)
    linear = model.get_submodule("model.layers.1.mlp.down_proj")  # the same object, elsewhere
    linear.scales.data = linear.scales * 30
    other.get_submodule("model.layers.1.mlp.down_proj").scales.mul_(30)
    said = tokens_of(model)
    assert torch.equal(said, tokens_of(other))
    model.get_submodule("model.layers.0.self_attn.q_proj").share_memory()
    assert torch.equal(tokens_of(model), said)


def test_biases_are_trained(tmp_path: Path) -> None:
    """Kernels have no gradients; those of a bias are the same as below plain linears."""
    out = write_checkpoint(tmp_path / "out", tiny_model("qwen2"))
    name, found = "model.layers.0.self_attn.v_proj.bias", []
    for model in (dropbydrop.load(out), dropbydrop.load(out).dequantize()):
        bias = model.get_parameter(name).requires_grad_()
        model(IDS[:1, :9], labels=IDS[:1, :9]).loss.backward()
        assert bias.grad is not None
        found.append(bias.grad)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)


def tokens_of(model: Any) -> Tensor:
    """What the native step says, where there is one."""
    return model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)


def test_only_our_models_have_views() -> None:
    for function in (dropbydrop.precision, lambda model: dropbydrop.view(model, 2)):
        with pytest.raises(DropError, match="LlamaForCausalLM was not loaded from a dropbydrop"):
            function(tiny_llama())


def test_loading_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a folder"):
        dropbydrop.load(tmp_path / "nothing")
    with pytest.raises(FormatError, match="dropbydrop quantize MODEL OUT"):
        dropbydrop.load(save_tiny(tmp_path / "plain"))


def test_modules_have_a_readable_form(model: Any, code: str) -> None:
    text = repr(model)
    assert f"in_features=64, out_features=32, prefix={COUNTS[code][4]}, bias=False" in text
    assert "NestedHead(in_features=64, out_features=384, tied=True)" in text
    assert isinstance(model.model.layers[0].mlp.up_proj, NestedLinear)


# ------------------------------------------------------------------------- the form of planes


def test_planes_have_one_form_in_memory_and_another_on_disk(
    out: Path, model: Any, code: str
) -> None:
    """Held as the device's kernels read them; state_dict, decoding and moving do not show it."""
    checkpoint, name = Checkpoint.open(out), "model.layers.0.mlp.down_proj"
    codes = model.get_submodule(name).codes
    native = kernels.select(kind=code).native
    assert codes.packed == native
    flat = native and code == "bytes"
    assert {plane.data.dim() for plane in codes.held()} == ({1} if flat else {2})
    saved = model.state_dict()
    for m in range(1, COUNTS[code][4] + 1):
        stored = checkpoint.read_codes(name, m)
        assert torch.equal(saved[f"{name}.codes.{m}"], stored)
        assert torch.equal(codes.to_stored()[m - 1], stored)
    twin = dropbydrop.load(out)
    twin.load_state_dict(saved)
    assert torch.equal(logits(twin), logits(model))
    twin.load_state_dict(dropbydrop.load(out, bits=2).state_dict(), strict=False)
    assert torch.equal(logits(twin), logits(model))
    for key in (f"{name}.codes.1", f"{name}.scales", "model.embed_tokens.rows"):
        with pytest.raises(RuntimeError, match=f"{key} is not that of this checkpoint"):
            twin.load_state_dict({key: 1 - saved[key]}, strict=False)
    assert torch.equal(logits(twin), logits(model))
    moved = dropbydrop.view(model, 2).to("meta").get_submodule(name).codes
    assert moved[1].shape == checkpoint.read_codes(name, 1).shape
    assert codes.packed == native  # the base stays
    assert not moved.packed


def test_stored_planes_give_the_same_weights(out: Path, model: Any) -> None:
    name = "model.layers.1.self_attn.k_proj"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.registry.VARIABLE, "torch")
        plain = dropbydrop.load(out)
        assert not plain.get_submodule(name).codes.packed
        expected = [plain.get_submodule(name).rotated_weight(d) for d in DTYPES]
        torch.testing.assert_close(logits(plain), logits(dropbydrop.load(out)))
    for dtype, weight in zip(DTYPES, expected, strict=True):
        assert torch.equal(model.get_submodule(name).rotated_weight(dtype), weight)


# ------------------------------------------------------------------------------ native decoding


def test_tokens_are_decoded_natively_and_equal_the_reference_path(out: Path) -> None:
    """Every view, with the caches that `generate` makes; the reference is the model without it."""
    base = dropbydrop.load(out)
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    for bits in (2, 3, 4):
        view = dropbydrop.view(base, bits)
        assert fused_decode.native(view) == kernels.select().native
        found = [
            view.generate(IDS[:1], cache_implementation=kind, **settings)
            for kind in (None, "static")
        ]
        fused_decode.detach(view)
        assert fused_decode.how(view).startswith("through torch")
        expected = view.generate(IDS[:1], **settings)
        assert torch.equal(found[0], expected)
        assert torch.equal(found[1], expected)
    assert fused_decode.native(base) == kernels.select().native  # detached from the views alone


def test_dense_and_adapted_models_decode_through_torch(out: Path) -> None:
    model = dropbydrop.load(out, bits=2)
    model.dequantize()
    assert "Linear does not run from planes" in fused_decode.how(model)
    ids = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape[1] == IDS.shape[1] + 3
