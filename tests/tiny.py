"""Tiny random models of several families, and a tiny tokenizer, for tests.

`save_tiny(folder, family)` writes a complete Hugging Face folder in well under a second. Weights
are drawn wide enough that every layer matters, and vectors (norms, biases), which transformers
initialises to ones or zeros, are drawn too: a forgotten bias or norm shows.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 384

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
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # families that must be refused
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3-moe": (  # the first block is dense
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB},
    ),
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random model, float32, in eval mode."""
    name, extra = {**FAMILIES, **OTHERS}[family]
    common = {} if name == "GPT2Config" else _COMMON
    config = getattr(transformers, name)(**{**common, **extra, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(noise * (1.5 / p.shape[-1] ** 0.5))
            else:
                p.add_(noise, alpha=0.2)
    return model


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
