"""The native decode step against transformers' own blocks, on tiny models of each kind."""

import copy
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)

from dropbydrop import kernels
from dropbydrop.coding.planes import KINDS as PLANES
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import MAX_GEMV_ROWS, CpuGroup, Matrix, PreparedGroup
from dropbydrop.kernels.cpu.step import DecodeStep, Place
from dropbydrop.runtime import fused_decode
from dropbydrop.system.errors import KernelError, UnsupportedModelError
from dropbydrop.system.native_library import library
from random_model import random_planes, random_set

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
KINDS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with scaled positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}


class Coded(nn.Module):
    """A linear layer that runs from random codes."""

    def __init__(self, prepared: PreparedGroup) -> None:
        super().__init__()
        self.prepared = prepared

    def __deepcopy__(self, memo):
        return Coded(self.prepared)  # as a store of planes is shared by copies

    def forward(self, x):
        return self.prepared(x)[0]


def build(kind: str, code: str = "bytes", **changes):
    """A random model whose block matrices are coded with three planes, two of them used.

    kind: one of `KINDS`; `code`: kind of the planes.
    """
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind.split()[0], **{**SIZES, **KINDS.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    books = kernels.prepare_codebooks(random_set(random_planes(code, (1, 2, 3))))
    rotations: dict[int, Rotation] = {}
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4 + (parameter.dim() == 1)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                rows, d = linear.weight.shape
                rotation = rotations.setdefault(
                    d, Rotation.make(d, seed=d).scale(torch.linspace(0.5, 2, d))
                )
                codes = [torch.randint(0, 256, p.shape(rows, d)).byte() for p in books.set.planes]
                scales = (torch.rand(rows) * 0.1 + 0.05).half()
                bias = None if linear.bias is None else linear.bias.detach()
                matrix = Matrix(kernels.pack(codes, books.set.planes, rows, d), scales, bias)
                setattr(part, name, Coded(CpuGroup([matrix], books, rotation, 2)))
    return model


def group_of(modules) -> PreparedGroup:
    for module in modules:
        if not isinstance(module, Coded):
            raise UnsupportedModelError(f"{type(module).__name__} has no planes")
    first = modules[0].prepared
    matrices = [module.prepared.matrices[0] for module in modules]
    return CpuGroup(matrices, first.books, first.rotation, 2)


both = pytest.mark.parametrize("code", PLANES)


@pytest.fixture(params=[(kind, code) for kind in KINDS for code in PLANES], ids=" ".join)
def model(request):
    return build(*request.param)


def greedy(model, prompt: torch.Tensor, count: int, **settings) -> list[int]:
    settings = {"cache_implementation": "static"} | settings
    assistant = {k: settings.pop(k) for k in ("assistant_model",) if k in settings}
    config = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0, **settings)
    with torch.no_grad():
        ids = model.generate(prompt, generation_config=config, **assistant)
    return ids[0, prompt.shape[1] :].tolist()


def hidden_states(model, ids: torch.Tensor, prompt: int, sizes: list[int], dtype=None):
    """States of the tokens after the prompt, fed in pieces of the given sizes."""
    cache, states, at = StaticCache(config=model.config, max_cache_len=64), [], prompt
    with torch.no_grad():
        model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
        if dtype is not None:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        for size in sizes:
            out = model.model(
                input_ids=ids[:, at : at + size], past_key_values=cache, use_cache=True
            )
            states.append(out.last_hidden_state[0])
            at += size
    return torch.cat(states)


@contextmanager
def native(model, kernel: str | None = None):
    """The model with the native step attached; gives the sizes of the calls that it took."""
    calls: list[int] = []
    plain = DecodeStep.__call__

    def counted(step, embedded, *args):
        calls.append(len(embedded))
        return plain(step, embedded, *args)

    fused_decode.attach(model, group_of, kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeStep, "__call__", counted)
        yield calls
    fused_decode.detach(model)


def test_states_equal_the_model(model):
    ids = torch.randint(1, 100, (1, 30))
    want = hidden_states(model, ids, 9, [1] * 21)
    with native(model) as calls:
        got = hidden_states(model, ids, 9, [1] * 21)
    assert calls == [1] * 21
    assert (got - want).norm() / want.norm() < 1e-3
    after = hidden_states(model, ids, 9, [1] * 21)
    assert torch.equal(after, want)  # detached


@pytest.mark.parametrize("cache", ["static", None])
def test_generates_the_same_tokens(model, cache):
    prompt = torch.randint(1, 100, (1, 7))
    want = greedy(model, prompt, 24)
    with native(model) as calls:
        assert greedy(model, prompt, 24, cache_implementation=cache) == want
    assert calls == [1] * 23


@both
def test_assisted_generation(code):
    """Candidates are verified several at a time on a dynamic cache that is cropped in between."""
    model, draft = build("llama", code), build("llama", code, num_hidden_layers=1)
    prompt = torch.randint(1, 100, (1, 7))
    want = greedy(model, prompt, 20, cache_implementation=None)
    with native(model) as calls:
        found = greedy(model, prompt, 20, cache_implementation=None, assistant_model=draft)
    assert found == want
    assert max(calls) > 1


@both
def test_pieces_and_threads_do_not_change_bits(code):
    model = build("llama", code)
    ids = torch.randint(1, 100, (1, 40))
    threads, results = torch.get_num_threads(), []
    try:
        with native(model) as calls:
            for count, sizes in ((1, [1] * 32), (1, [3, 1, 16, 12]), (2, [16, 16]), (3, [1] * 32)):
                torch.set_num_threads(count)
                results.append(hidden_states(model, ids, 8, sizes))
    finally:
        torch.set_num_threads(threads)
    assert sum(calls) == 4 * 32
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_caches(dtype):
    model = build("llama")
    ids = torch.randint(1, 100, (1, 30))
    want = hidden_states(model, ids, 9, [1] * 21)
    with native(model) as calls:
        got = hidden_states(model, ids, 9, [1] * 21, dtype)
    assert len(calls) == 21
    assert (got - want).norm() / want.norm() < 0.02


def test_leaves_other_calls_alone():
    model = build("llama")
    ids = torch.randint(1, 100, (2, 6))

    def prompted(batch=ids[:1], **settings):
        cache = DynamicCache(config=model.config)
        model(input_ids=batch, past_key_values=cache, use_cache=True, **settings)
        return cache

    def goes_on(cache, batch=ids[:1, :1], **settings):
        return model(input_ids=batch, past_key_values=cache, use_cache=True, **settings)

    with native(model) as calls, torch.no_grad():
        goes_on(prompted(ids), ids[:, :1])  # a batch of two
        goes_on(prompted(), torch.randint(1, 100, (1, MAX_GEMV_ROWS + 1)))
        mask = torch.ones(1, 6, dtype=torch.long)
        mask[0, :2] = 0  # padding on the left
        goes_on(prompted(attention_mask=mask), attention_mask=torch.cat([mask, mask[:, 5:]], 1))
        goes_on(prompted(), position_ids=torch.tensor([[9]]))
        tree = torch.ones(1, 1, 2, 8, dtype=torch.bool)
        tree[..., 1, 6] = False  # two candidates for the same place
        goes_on(prompted(), ids[:1, :2], attention_mask=tree)
        out = goes_on(prompted(), output_hidden_states=True)
        assert len(out.hidden_states) == 3
        with torch.autocast("cpu", torch.bfloat16):
            goes_on(prompted())
        assert calls == []
        tree[..., 0, 7], tree[..., 1, 6] = False, True  # the plain mask, and transformers' own
        goes_on(prompted(), ids[:1, :2], attention_mask=tree)  # hooks are idle by now
        assert calls == [2]
    with native(model) as calls:  # training keeps its graph
        goes_on(prompted())
        assert calls == []


def test_notices_what_changes_in_the_model():
    model = build("llama")
    ids = torch.randint(1, 100, (1, 12))
    with native(model) as calls:
        hidden_states(model, ids, 6, [6])
        block = model.model.layers[1]
        seen = []
        hook = block.self_attn.register_forward_hook(lambda *a: seen.append(1))
        hidden_states(model, ids, 6, [6])
        assert len(seen) == 2
        hook.remove()

        old, block.mlp.up_proj = block.mlp.up_proj, nn.Linear(48, 88, bias=False)
        hidden_states(model, ids, 6, [6])
        assert len(calls) == 1
        assert fused_decode.how(model).startswith("through torch: Linear")
        block.mlp.up_proj = old
        hidden_states(model, ids, 6, [6])
        assert len(calls) == 2

        model.model.norm.half().float()  # other memory, the same numbers to half precision
        model.model.norm.weight.data.mul_(2)
        with torch.no_grad():
            block.input_layernorm.weight.mul_(3)
        got = hidden_states(model, ids, 6, [6])
        assert len(calls) == 3
        norm = block.post_attention_layernorm
        norm.weight = nn.Parameter(norm.weight * 2)  # another tensor
        got = hidden_states(model, ids, 6, [6])
        assert len(calls) == 4
    want = hidden_states(model, ids, 6, [6])
    assert (got - want).norm() / want.norm() < 1e-3


CHANGES = {
    "frequencies in place": lambda m: m.rotary_emb.inv_freq.mul_(0.3),
    "other frequencies": lambda m: setattr(m.rotary_emb, "inv_freq", m.rotary_emb.inv_freq * 0.3),
    "rotary scale": lambda m: setattr(m.rotary_emb, "attention_scaling", 1.7),
    "attention": lambda m: setattr(m.layers[1].self_attn, "scaling", 0.9),
    "norm": lambda m: setattr(m.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "activation": lambda m: setattr(m.layers[1].mlp, "act_fn", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("before", [True, False], ids=["running", "before the first token"])
def test_notices_numbers_and_buffers(change, before):
    model = build("llama")
    ids = torch.randint(1, 100, (1, 12))
    with native(model):
        first = hidden_states(copy.deepcopy(model), ids, 6, [6])
        if before:
            hidden_states(model, ids, 6, [6])
        with torch.no_grad():
            change(model.model)
        got = hidden_states(model, ids, 6, [6])
    want = hidden_states(model, ids, 6, [6])
    assert (got - want).norm() / want.norm() < 1e-3
    assert (got - first).norm() / want.norm() > 1e-2


def test_notices_hooks_on_all_modules():
    model = build("llama")
    ids = torch.randint(1, 100, (1, 12))
    with native(model) as calls:
        hidden_states(model, ids, 6, [6])
        handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
        hidden_states(model, ids, 6, [6])
        handle.remove()
        assert len(calls) == 1
        hidden_states(model, ids, 6, [6])
        assert len(calls) == 2


def test_every_copy_has_its_own_step():
    model = build("llama")
    ids = torch.randint(1, 100, (1, 12))
    with native(model) as calls:
        want = hidden_states(model, ids, 6, [6])
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.norm.weight.mul_(2)
        torch.testing.assert_close(hidden_states(twin, ids, 6, [6]), 2 * want)
        assert torch.equal(hidden_states(model, ids, 6, [6]), want)
        assert len(calls) == 3
        gone = weakref.ref(twin)
        del twin
        assert gone() is None  # without waiting for the garbage collector


def test_many_threads_at_once():
    model = build("llama")
    ids = torch.randint(1, 100, (1, 40))
    with native(model) as calls:
        want = hidden_states(model, ids, 8, [1] * 32)
        fused_decode.attach(model, group_of)  # anew: the threads build the step at the same moment
        start, results = threading.Barrier(4), []

        def work():
            start.wait()
            results.append(hidden_states(model, ids, 8, [1] * 32))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 5 * 32
    for result in results:
        assert torch.equal(result, want)


def test_compiled_code_does_not_contain_it():
    model = build("llama", num_hidden_layers=1)
    ids = torch.randint(1, 100, (1, 12))
    want = hidden_states(model, ids, 6, [1])
    with native(model) as calls:
        model.model.layers[0].mlp.forward = torch.compile(
            model.model.layers[0].mlp.forward, backend="eager"
        )
        got = hidden_states(model, ids, 6, [1])
        assert calls == []  # a compiled part is a part that was replaced
        del model.model.layers[0].mlp.forward
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        whole = torch.compile(model, backend="eager")
        with torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=16)
            whole(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
            out = whole(input_ids=ids[:, 6:7], past_key_values=cache, use_cache=True)
        assert calls == []
        logits = model.lm_head(want)
        assert (out.logits[0] - logits).norm() / logits.norm() < 1e-3


@both
def test_every_kernel(code):
    model = build("llama", code)
    ids = torch.randint(1, 100, (1, 20))
    want = hidden_states(model, ids, 9, [1] * 11)
    for kernel in kernels.available():
        if kernel.native:
            with native(model, kernel.name) as calls:
                got = hidden_states(model, ids, 9, [1] * 11)
            assert len(calls) == 11
            limit = 0.2 if kernel.name.endswith("u8") and code == "bytes" else 1e-3
            assert (got - want).norm() / want.norm() < limit


def test_refuses_what_it_does_not_compute():
    with pytest.raises(UnsupportedModelError, match="'gelu'"):
        DecodeStep(build("llama", hidden_act="gelu").model, group_of)
    with pytest.raises(UnsupportedModelError, match="window"):
        DecodeStep(build("mistral", sliding_window=16).model, group_of)
    other = build("llama")
    other.model.config = AutoConfig.for_model("gpt_neox", hidden_size=48, num_attention_heads=6)
    with pytest.raises(UnsupportedModelError, match="'gpt_neox'"):
        DecodeStep(other.model, group_of)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        DecodeStep(build("llama", rope_parameters=dynamic).model, group_of)
    with pytest.raises(UnsupportedModelError, match="'torch'"):
        DecodeStep(build("llama").model, group_of, "torch")
    with pytest.raises(KernelError):
        DecodeStep(build("llama").model, group_of, "sse9")


def test_refuses_a_full_cache():
    model = build("llama")
    step = DecodeStep(model.model, group_of)
    caches = [(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"\(8, 8\)"):
        step(torch.zeros(2, 48), [Place(7, caches), Place(8, caches)])


class TestSeveralSequences:
    """`decode_together`: one pass over the weights, the same bits as each sequence by itself."""

    def prompted(self, model, lengths, static=True):
        caches = []
        for length in lengths:
            size = 8 + length
            cache = StaticCache(config=model.config, max_cache_len=size) if static else None
            cache = cache or DynamicCache(config=model.config)
            ids = torch.arange(1, length + 1)[None]
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache, use_cache=True)
            caches.append(cache)
        return caches

    @both
    @pytest.mark.parametrize("kind", ["llama", "qwen3"])
    @pytest.mark.parametrize("static", [True, False])
    def test_rows_equal_the_sequences_alone(self, kind, code, static):
        model, lengths = build(kind, code), [5, 12, 1, 9]
        with native(model) as calls, torch.no_grad():
            alone = self.prompted(model, lengths, static)
            want = [[] for _ in lengths]
            for step in range(3):
                for logits, cache, at in zip(want, alone, lengths, strict=True):
                    ids = torch.tensor([[at + step]])
                    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                    logits.append(out.logits[0, -1])
            caches, before = self.prompted(model, lengths, static), len(calls)
            for step in range(3):
                ids = [at + step for at in lengths]
                got = fused_decode.decode_together([model] * 4, ids, caches)
                for row, logits in zip(got, want, strict=True):
                    assert torch.equal(row, logits[step])
            assert calls[before:] == [4, 4, 4]
            assert [c.get_seq_length() for c in caches] == [at + 3 for at in lengths]

    def test_nothing_is_touched_where_one_cache_does_not_fit(self):
        model = build("llama")
        with native(model) as calls, torch.no_grad():
            caches = self.prompted(model, [4, 6])
            full = StaticCache(config=model.config, max_cache_len=3)
            model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=full, use_cache=True)
            for other in (full, DynamicCache(config=model.config)):
                done, before = len(calls), caches[0].layers[0].keys.clone()
                assert fused_decode.decode_together([model] * 2, [1, 2], [caches[0], other]) is None
                assert len(calls) == done
                assert caches[0].get_seq_length() == 4
                assert torch.equal(caches[0].layers[0].keys, before)

    def test_a_model_without_the_step_has_no_shared_pass(self):
        model = build("llama")
        with torch.no_grad():
            caches = self.prompted(model, [4, 6])
            assert fused_decode.decode_together([model] * 2, [1, 2], caches) is None
        with native(model):
            assert fused_decode.decode_together([model] * 2, [1, 2], caches) is None  # gradients
            with torch.no_grad():
                assert fused_decode.decode_together([], [], []) is None
