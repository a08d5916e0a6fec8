"""The native decode step against transformers' own blocks, on tiny models of each kind."""

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
from dropbydrop.code import codebook_table
from dropbydrop.errors import KernelError, UnsupportedModelError
from dropbydrop.kernels import Bound, Matrix
from dropbydrop.kernels._native import library
from dropbydrop.kernels.step import MOST, DecodeStep
from dropbydrop.rotation import Rotation

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

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x):
        return self.bound(x)[0]


def build(kind: str, **changes):
    """A random model whose block matrices are coded with three planes, two of them used."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind.split()[0], **{**SIZES, **KINDS.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    books = kernels.prepare_codebooks(
        [codebook_table(torch.randn(128, 8) * 0.5**m) for m in range(3)], symmetric=True
    )
    rotations: dict[int, Rotation] = {}
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4 + (parameter.dim() == 1)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                rows, d = linear.weight.shape
                rotation = rotations.setdefault(d, Rotation.make(d, seed=d))
                codes = [torch.randint(0, 256, (rows, d // 8)).byte() for _ in range(3)]
                scales = (torch.rand(rows) * 0.1 + 0.05).half()
                bias = None if linear.bias is None else linear.bias.detach()
                matrix = Matrix(kernels.pack(codes), scales, bias)
                setattr(part, name, Coded(Bound([matrix], books, rotation, 2)))
    return model


def bound_of(module: nn.Module) -> Bound:
    return module.bound


@pytest.fixture(params=list(KINDS))
def model(request):
    return build(request.param)


def greedy(model, prompt: torch.Tensor, count: int, **settings) -> list[int]:
    config = GenerationConfig(
        max_new_tokens=count, do_sample=False, cache_implementation="static", pad_token_id=0
    )
    with torch.no_grad():
        ids = model.generate(prompt, generation_config=config, **settings)
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


class Counted(DecodeStep):
    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return super().__call__(*args)


def test_states_equal_the_model(model):
    ids = torch.randint(1, 100, (1, 30))
    want = hidden_states(model, ids, 9, [1] * 21)
    with Counted(model, bound_of) as step:
        got = hidden_states(model, ids, 9, [1] * 21)
    assert step.calls == 21
    assert (got - want).norm() / want.norm() < 1e-3
    after = hidden_states(model, ids, 9, [1] * 21)
    assert torch.equal(after, want)  # detached


def test_generates_the_same_tokens(model):
    prompt = torch.randint(1, 100, (1, 7))
    want = greedy(model, prompt, 24)
    with Counted(model, bound_of) as step:
        assert greedy(model, prompt, 24) == want
    assert step.calls == 23


def test_pieces_and_threads_do_not_change_bits():
    model = build("llama")
    ids = torch.randint(1, 100, (1, 40))
    threads, results = torch.get_num_threads(), []
    try:
        with Counted(model, bound_of):
            for count, sizes in ((1, [1] * 32), (1, [3, 1, 16, 12]), (2, [16, 16]), (3, [1] * 32)):
                torch.set_num_threads(count)
                results.append(hidden_states(model, ids, 8, sizes))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_caches(dtype):
    model = build("llama")
    ids = torch.randint(1, 100, (1, 30))
    want = hidden_states(model, ids, 9, [1] * 21)
    with Counted(model, bound_of) as step:
        got = hidden_states(model, ids, 9, [1] * 21, dtype)
    assert step.calls == 21
    assert (got - want).norm() / want.norm() < 0.02


def test_leaves_other_calls_alone():
    model = build("llama")
    ids = torch.randint(1, 100, (2, 6))
    with Counted(model, bound_of) as step, torch.no_grad():
        for batch in (ids, ids[:1]):  # prompts, a batch of two, a growing cache
            cache = DynamicCache(config=model.config)
            model(input_ids=batch, past_key_values=cache, use_cache=True)
            model(input_ids=batch[:, :1], past_key_values=cache, use_cache=True)
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache = StaticCache(config=model.config, max_cache_len=64)
        mask = torch.ones(1, 6, dtype=torch.long)
        mask[0, :2] = 0  # padding on the left
        model(input_ids=ids[:1], attention_mask=mask, past_key_values=cache, use_cache=True)
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
        model(input_ids=ids[:1, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        long = torch.randint(1, 100, (1, MOST + 1))
        model(input_ids=long, past_key_values=cache, use_cache=True)
    with step:  # training keeps its graph
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(input_ids=ids[:1], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:1, :1], past_key_values=cache, use_cache=True)
    assert step.calls == 0


def test_every_kernel():
    model = build("llama")
    ids = torch.randint(1, 100, (1, 20))
    want = hidden_states(model, ids, 9, [1] * 11)
    for kernel in kernels.available():
        if kernel.native:
            with DecodeStep(model, bound_of, kernel.name):
                got = hidden_states(model, ids, 9, [1] * 11)
            limit = 0.2 if kernel.name.endswith("u8") else 1e-3
            assert (got - want).norm() / want.norm() < limit


def test_refuses_what_it_does_not_compute():
    with pytest.raises(UnsupportedModelError, match="'gelu'"):
        DecodeStep(build("llama", hidden_act="gelu"), bound_of)
    with pytest.raises(UnsupportedModelError, match="window"):
        DecodeStep(build("mistral", sliding_window=16), bound_of)
    other = build("llama")
    other.config = AutoConfig.for_model("gpt_neox", hidden_size=48, num_attention_heads=6)
    with pytest.raises(UnsupportedModelError, match="'gpt_neox'"):
        DecodeStep(other, bound_of)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        DecodeStep(build("llama", rope_parameters=dynamic), bound_of)
    with pytest.raises(UnsupportedModelError, match="'torch'"):
        DecodeStep(build("llama"), bound_of, "torch")
    with pytest.raises(KernelError):
        DecodeStep(build("llama"), bound_of, "sse9")


def test_refuses_a_full_cache():
    model = build("llama")
    step = DecodeStep(model, bound_of)
    caches = [(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16)) for _ in range(2)]
    with pytest.raises(ValueError, match="cache of 8"):
        step(torch.zeros(2, 48), 7, caches)
