"""Tiny random models of several families, checkpoints of them, and a tiny tokenizer, for tests.

`save_tiny(folder, family)` writes a complete Hugging Face folder in well under a second,
`write_checkpoint(folder)` a checkpoint with random codes. Weights are drawn wide enough that every
layer matters, and vectors (norms, biases), which transformers initialises to ones or zeros, are
drawn too: a forgotten bias or norm shows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from dropbydrop.system.digest import FileHasher
from random_model import random_checkpoint

VOCAB = 384
CODES = ("bytes", "trellis")  # kinds of planes
# planes that each level of `write_checkpoint` reads; those of trellis have 2, 1 and 1 bits
COUNTS = {"bytes": {2: 2, 3: 3, 4: 4}, "trellis": {2: 1, 3: 2, 4: 3}}

# d = 48 = 16 x 3 and 80 = 16 x 5: multiples of the group size with odd factors
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {
            "tie_word_embeddings": True,
            "sliding_window": 7,
            "layer_types": _LOCAL,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "tie_word_embeddings": True,
            "sliding_window": 7,
            "layer_types": _LOCAL,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("Phi3Config", {}),
}
_DEEP: dict[str, Any] = {  # of 4 experts and a shared one, after a dense block
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {  # mixtures of experts
    "qwen3-moe": ("Qwen3MoeConfig", {**_EXPERTS, "mlp_only_layers": [0]}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_5-moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "mixtral": ("MixtralConfig", _LOCAL_EXPERTS),
    "gpt-oss": ("GptOssConfig", {**_LOCAL_EXPERTS, "sliding_window": 7}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}),
    "granitemoe": ("GraniteMoeConfig", _LOCAL_EXPERTS),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 6,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
        },
    ),
    "glm4-moe": ("Glm4MoeConfig", _DEEP),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_DEEP,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 8,
        },
    ),
    "gemma4-moe": (
        "Gemma4TextConfig",
        {
            "tie_word_embeddings": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 7,
            "layer_types": _LOCAL,
            "global_head_dim": 16,
        },
    ),
    "ernie4_5-moe": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
        },
    ),
    "minimax-m2": ("MiniMaxM2Config", _LOCAL_EXPERTS),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        {
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "tie_word_embeddings": True,
        },
    ),
    "nemotron-h": (  # no gate; one mixer a block
        "NemotronHConfig",
        {
            **_DEEP,
            "layers_block_type": ["attention", "moe", "moe"],
            "moe_shared_expert_intermediate_size": 24,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
    ),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # families that must be refused
    "jetmoe": (  # its experts are none of transformers' registered ones
        "JetMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB},
    ),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model."""
    name, extra = {**FAMILIES, **EXPERTS, **OTHERS}[family]
    if not hasattr(transformers, name):  # an older one: what it lacks is skipped by name
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    common = {} if name == "GPT2Config" else _COMMON
    return getattr(transformers, name)(**{**common, **extra, **overrides})


def tiny_model(
    family: str, seed: int = 0, *, gain: float = 1.5, **overrides: Any
) -> transformers.PreTrainedModel:
    """A random model, float32, in eval mode: matrices N(0, gain^2 / d_in), vectors off by 0.2."""
    config = tiny_config(family, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(noise * (gain / p.shape[-1] ** 0.5))
            else:
                p.add_(noise, alpha=0.2)
        for name, buffer in sorted(model.named_buffers()):
            if "correction_bias" in name or "expert_bias" in name:  # what routers add to scores
                buffer.add_(torch.randn(buffer.shape, generator=generator), alpha=0.2)
    return model


def tiny_llama(seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A tied Llama of two blocks, hidden 64, intermediate 96 (odd factor 3), with soft logits."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return tiny_model("llama-tied", seed, gain=0.64, **{**shape, **changes})


@lru_cache(maxsize=1)
def _trained() -> str:
    """JSON of a byte-level BPE trained on a few sentences; ids 0-4 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "the river runs past the old mill and the old mill stands by the river",
        "a small model reads a small text and writes another small text about the sea",
        "one hundred and twenty three ships left the harbour in the morning",
    ]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return tokenizer.to_str()


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(bos: bool = False, chat: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of at most VOCAB entries; optionally adding <s>, or with a template."""
    raw = Tokenizer.from_str(_trained())
    if bos:
        from tokenizers.processors import TemplateProcessing

        raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tiny(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    *,
    bos: bool = False,
    chat: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny model with its tokenizer; returns `folder`."""
    model = tiny_model(family, seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(bos, chat).save_pretrained(folder)
    return Path(folder)


def copy_of(folder: Path, to: Path, **config: object) -> Path:
    """A copy of a model folder with other entries in its config.json."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**settings, **config}))
    return to


def gguf_writer(file: Path, arch: str, sizes: Mapping[str, int], vocab: int = VOCAB) -> Any:
    """A writer of a GGUF that has the tiny tokenizer; its tensors are for the caller.

    sizes: d, ff, heads, kv, layers.
    """
    import gguf

    raw = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = sorted(raw["vocab"], key=raw["vocab"].get)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(sizes["d"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["ff"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary + [f"<unused{i}>" for i in range(vocab - len(vocabulary))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def close_gguf(writer: Any) -> None:
    """Write all that the writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(file: Path) -> None:
    """A two-layer Llama with random float32 weights, and the tiny tokenizer."""
    d, ff, heads, kv, layers = 48, 80, 3, 1, 2
    sizes = {"d": d, "ff": ff, "heads": heads, "kv": kv, "layers": layers}
    writer = gguf_writer(file, "llama", sizes)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32) * 0.2)

    add("token_embd.weight", VOCAB, d)
    add("output_norm.weight", d)
    add("output.weight", VOCAB, d)
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}.weight", d)
        add(f"blk.{i}.attn_q.weight", d, d)
        add(f"blk.{i}.attn_output.weight", d, d)
        for name in ("attn_k", "attn_v"):
            add(f"blk.{i}.{name}.weight", d // heads * kv, d)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{name}.weight", ff, d)
        add(f"blk.{i}.ffn_down.weight", d, ff)
    close_gguf(writer)


def write_checkpoint(
    out: Path,
    model: transformers.PreTrainedModel | None = None,
    *,
    extra_files: Mapping[str, bytes | Path] | None = None,
    tokenizer: bool = True,
    chat: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a valid checkpoint of `model` (default `tiny_llama(seed)`) with random codes.

    With `chat` its tokenizer has a template. Everything but the linears of the blocks is the
    model's, and every second input group has input scales. `settings` are
    those of `random_checkpoint`, and what they leave those of `CheckpointWriter`. The same
    arguments give the same bytes.
    """
    model = tiny_llama(seed) if model is None else model
    files = dict(extra_files or {}) | (_tokenizer_files(chat) if tokenizer else {})
    return random_checkpoint(out, model, scaled_inputs=True, files=files, seed=seed, **settings)


def sign(folder: Path, *names: str, xxh128: bool = True) -> None:
    """Make the manifest say what these files are, by default all of them that it lists, as whoever
    edits a checkpoint on purpose would; without `xxh128` as the first writers did."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in names or manifest["files"]:
        hasher = FileHasher()
        hasher.update((folder / name).read_bytes())
        entry = hasher.entry()
        manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}
        if xxh128:
            manifest["files"][name]["xxh128"] = list(entry.xxh128 or ())
    path.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _tokenizer_files(chat: bool) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer(chat=chat).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def decoded_reference(model: nn.Module, loaded: nn.Module) -> nn.Module:
    """A plain Llama with the dense weights that `loaded` decodes to: the reference for logits."""
    from dropbydrop.runtime.int8_modules import NestedEmbedding, NestedHead
    from dropbydrop.runtime.modules import NestedLinear

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in loaded.named_modules():
        if isinstance(module, (NestedLinear, NestedEmbedding, NestedHead)):
            state[f"{name}.weight"] = module.dense_weight()
            if getattr(module, "bias", None) is not None:
                state[f"{name}.bias"] = module.bias.detach().float()
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            state[f"{name}.weight"] = module.weight.detach().float()
    plain = transformers.LlamaForCausalLM(model.config).eval()
    plain.load_state_dict(state)
    return plain
