"""Tiny random models of the families that differ from a plain decoder in keys, class or blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

_CONV = ["conv", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
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

_KV = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_PLE = {  # inputs for each layer that depend on the tokens; the last two layers take earlier keys
    "num_hidden_layers": 4,
    "layer_types": _KV,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
_GEMMA3N = {
    **_PLE,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 8,
    "altup_num_inputs": 3,
    "intermediate_size": [48] * 4,
}
_GEMMA4 = {
    "layer_types": _KV[:2],
    "sliding_window": 4,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
}
_GRANITE = {
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 48,
    **_MAMBA,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
}

TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("bamba", {"attn_layer_indices": [1], **_MAMBA, "mamba_n_groups": 1}),
    "falcon_h1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1}),
    "gemma3_text": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3n_text": ("gemma3n_text", _GEMMA3N),
    "gemma4_e": ("gemma4_text", {**_GEMMA4, **_PLE}),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gpt_neox": ("gpt_neox", {}),
    "granitemoehybrid": ("granitemoehybrid", _GRANITE),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "lfm3": ("lfm3", {"layer_types": _CONV, "use_attention_gate": True}),
    "mixtral": ("mixtral", {"num_local_experts": 3}),
    "nemotron_h": (
        "nemotron_h",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_DELTA, "linear_num_value_heads": 2}),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "qwen3_next": ("qwen3_next", {**_DELTA, "mlp_only_layers": [0, 1], "num_experts": 0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
}
# class of the text decoder's config, its settings; those of the vision tower; those of the wrapper
_IMAGE = {"image_token_id": 95}
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        TEXT["gemma3_text"][1],
        {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        {"mm_tokens_per_image": 4, "image_token_index": 95},
    ),
    "gemma4": (
        "gemma4_text",
        {**_GEMMA4, **_PLE},
        {
            **_VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "image_size": 32,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        {**_IMAGE, "audio_config": None},
    ),
    "internvl": (
        "qwen2",
        {},
        {**_VISION, "image_size": (16, 16), "patch_size": (8, 8)},
        {**_IMAGE, "image_seq_length": 1},
    ),
    "llava": (
        "llama",
        {},
        {**_VISION, "model_type": "clip_vision_model"},
        {"image_token_id": 95, "vision_feature_layer": -1},
    ),
    "mistral3": (
        "mistral",
        {},
        {**_VISION, "model_type": "pixtral", "head_dim": 8},
        {"image_token_id": 95, "spatial_merge_size": 1, "vision_feature_layer": -1},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            }
        },
        {**_QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [0]},
        {**_IMAGE, "vision_start_token_id": 93},
    ),
    "qwen3_5": (
        "qwen3_5_text",
        _DELTA,
        {**_QWEN_VISION, "num_position_embeddings": 16},
        {**_IMAGE, "vision_start_token_id": 93},
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            }
        },
        {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {**_IMAGE, "vision_start_token_id": 93},
    ),
    "smolvlm": ("llama", {}, _VISION, {**_IMAGE, "scale_factor": 2}),
}
# Gemma 4 without inputs for each layer and without keys that layers share (26B-A4B's dense kin)
WRAPPERS["gemma4_dense"] = ("gemma4_text", _GEMMA4, *WRAPPERS["gemma4"][2:])
# families whose keys are not the names of their parameters
RENAMED = ["gemma3", "gpt_neox", "lfm3", "mixtral", "nemotron_h", "olmo_hybrid", "qwen3_moe"]
DENSE = [name for name in (*TEXT, *WRAPPERS) if name not in ("mixtral", "qwen3_moe")]


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


def require(kind: str) -> None:
    """Skip the test that asks for a type of models that this transformers does not have."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")


def config_of(family: str) -> Any:
    if family in TEXT:
        kind, more = TEXT[family]
        require(kind)
        return AutoConfig.for_model(kind, **{**SMALL, **more})
    kind, text, vision, more = WRAPPERS[family]
    require(kind)
    inner = AutoConfig.for_model(kind, **{**SMALL, **text}).to_dict()
    wrapper = family.removesuffix("_dense")
    require(wrapper)
    return AutoConfig.for_model(wrapper, text_config=inner, vision_config=vision, **more)


def build(family: str) -> PreTrainedModel:
    """A model with random values, of the class that a folder of this family has."""
    auto = AutoModelForImageTextToText if family in WRAPPERS else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config_of(family), dtype=torch.float32)
    return fill(model)


def image_inputs(family: str) -> dict[str, Tensor]:
    """20 tokens with one image among them, as the processor of a wrapper would give them.

    What stands for the image in the tokens, and in which form its pixels come: patches in rows with
    a grid (Qwen) or with coordinates (Gemma 4), else a picture of 16 x 16 pixels.
    """
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (1, 20), generator=generator)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    given = {"input_ids": ids, "pixel_values": pixels}
    tokens = 1 if family.startswith(("qwen", "internvl", "smolvlm")) else 4
    ids[0, 2 : 2 + tokens] = 95
    if family.startswith("qwen"):
        ids[0, 1] = 93  # the image begins
        given["pixel_values"] = torch.randn(4, 3 * 2 * 8 * 8, generator=generator)
        given["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    elif family.startswith("gemma4"):
        given["pixel_values"] = torch.rand(1, 16, 3 * 8 * 8, generator=generator)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        given["image_position_ids"] = places[None]
    elif family == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]])
    elif family == "smolvlm":
        given["pixel_values"] = pixels[None]  # of one text, one picture
    if family == "gemma3":
        given["token_type_ids"] = (ids == 95).long()
    elif family.startswith(("qwen", "gemma4")):
        given["mm_token_type_ids"] = (ids == 95).long()
    return given


def save(folder: Path, family: str) -> PreTrainedModel:
    """Write the folder of `build(family)`; returns the model."""
    model = build(family)
    model.save_pretrained(folder)
    return model
