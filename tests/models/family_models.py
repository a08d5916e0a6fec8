"""Tiny random models of the families that differ from a plain decoder in keys, class or blocks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

LINEAR = ["linear_attention", "full_attention"]
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DELTA = {
    "layer_types": LINEAR,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_neox": ("gpt_neox", {}),
    "lfm3": ("lfm3", {"layer_types": ["conv", "full_attention"], "use_attention_gate": True}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "nemotron_h": ("nemotron_h", {}),
    "olmo_hybrid": ("olmo_hybrid", {**_DELTA, "linear_num_value_heads": 2}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
}
# class of the text decoder's config, its settings; those of the vision tower; those of the wrapper
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        TEXT["gemma3_text"][1],
        {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        {"mm_tokens_per_image": 4, "image_token_index": 95},
    ),
    "qwen3_5": ("qwen3_5_text", _DELTA, {}, {"image_token_id": 95}),
}
# families whose keys are not the names of their parameters
RENAMED = ["gemma3", "gpt_neox", "lfm3", "mixtral", "nemotron_h", "olmo_hybrid", "qwen3_moe"]


def fill(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random values in every parameter and stored buffer, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in sorted(stored):
            tensor = stored[name]
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            else:
                tensor.add_(noise, alpha=0.1)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def config_of(family: str) -> Any:
    if family in TEXT:
        kind, more = TEXT[family]
        return AutoConfig.for_model(kind, **{**SMALL, **more})
    kind, text, vision, more = WRAPPERS[family]
    inner = AutoConfig.for_model(kind, **{**SMALL, **text}).to_dict()
    return AutoConfig.for_model(family, text_config=inner, vision_config=vision, **more)
