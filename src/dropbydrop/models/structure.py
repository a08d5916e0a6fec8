"""Which class of transformers a folder is loaded with, and where the blocks of its text are.

A text model is the causal LM that transformers names for its config. A model of several modalities
is a wrapper: a text decoder, towers for images or sound, and projectors between them. The folder is
built with the class that its config names, so that what was quantized loads as what it was; the
blocks are those of the text decoder. Towers and projectors stay as they are, and towers are not
even read while text runs through the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError, UnsupportedModelError, first_line

from .pretrained import config_of, model_from

_HYPER = (
    "hyper-connections mix several copies of the hidden state with weights that depend on the "
    "tokens, between the blocks as well as in them"
)
_TWO = "a block of it is two decoder blocks whose parts run across each other"
_LLAMA4 = "its own code reads the weights of layers that are replaced by codes"
REFUSED: Mapping[str, str] = {  # by model_type of the config or of its text part
    "deepseek_v4": _HYPER,
    "hy_v4": _HYPER,
    "glm5_next": _HYPER,
    "glm5_next_text": _HYPER,
    "qwen4_exp": _HYPER,
    "qwen4_exp_text": _HYPER,
    "longcat_flash": _TWO,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "moshi": "its own mask is wrong once its cache drops tokens",
    "rwkv": "it divides the weights of its layers whenever it runs (rescale_every)",
}


def build_model(folder: Path, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The model of a folder's config.json: parameters on the meta device, buffers on `device`.

    Raises:
        UnsupportedModelError: refused by name, or transformers does not build it.
    """
    config = config_of(folder)
    refuse_by_name(config)
    config.use_cache = False
    config.get_text_config().use_cache = False
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        try:
            model: PreTrainedModel = model_from(config, dtype=dtype)
        except DropError:
            raise
        except Exception as error:  # those of its many classes share no base
            raise UnsupportedModelError(
                f"{folder}/config.json describes no causal language model that the installed "
                f"transformers builds without remote code: {first_line(error)}"
            ) from error
    model.eval().requires_grad_(False)
    for module in model.modules():  # buffers were made on the CPU
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def refuse_by_name(config: PretrainedConfig) -> None:
    """Refuse families that cannot be run block by block, with the reason.

    Raises:
        UnsupportedModelError: says why, and what to do.
    """
    for kind in (config.model_type, config.get_text_config().model_type):
        if kind in REFUSED:
            raise UnsupportedModelError(
                f"models of type {kind!r} are not supported: {REFUSED[kind]}. Use another model; "
                "docs/models.md lists those that work."
            )


def text_decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Name and module of the text decoder: the part that embeds tokens and has the blocks."""
    decoder = model.get_decoder()
    return next((n, m) for n, m in model.named_modules() if m is decoder)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList of the text decoder with one entry a layer of the config.

    Raises:
        UnsupportedModelError: there is none, or several.
    """
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside, decoder = text_decoder(model)
    start = f"{inside}." if inside else ""
    lists = {start + name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {
        name: m
        for name, m in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    fits = [(name, m) for name, m in outer.items() if len(m) and len(m) == wanted]
    if len(fits) != 1:
        found = ", ".join(f"{name} ({len(m)} entries)" for name, m in outer.items()) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} (model_type {model.config.model_type!r}) has no single list "
            f"of {wanted} decoder blocks; module lists found: {found}. Only decoder-only models "
            "made of one list of blocks are supported."
        )
    return fits[0]


def towers(model: PreTrainedModel) -> list[str]:
    """Names of the models beside the text decoder: those of images, video and sound."""
    inside, _ = text_decoder(model)
    path = {"", *(".".join(inside.split(".")[:k]) for k in range(1, inside.count(".") + 2))}
    found: list[str] = []
    for name, module in model.named_modules():
        beside = name not in path and not (inside and name.startswith(f"{inside}."))
        nested = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, PreTrainedModel) and beside and not nested and inside:
            found.append(name)
    return found
