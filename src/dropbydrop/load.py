"""Load a checkpoint at a precision, and make views of other precisions on the same storage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint
from .errors import DropError, FormatError, MissingPlaneError
from .hf import DropByDropConfig, register, set_level_parameters
from .linear import NestedLinear
from .store import PlaneStore


def load(
    path: Path | str,
    bits: int | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a checkpoint folder as an ordinary transformers model, in eval mode.

    Only planes 1..bits are read; files of other planes need not exist.

    Args:
        path: a local checkpoint folder.
        bits: one of the checkpoint's levels; by default the one its config names (the highest).
        dtype: type of the activations; by default that of the original model.
        device: where the tensors go.

    Returns:
        A `PreTrainedModel`; `generate`, `config` and `generation_config` are as usual.

    Raises:
        PrecisionError: `bits` is not a level of the checkpoint.
        MissingPlaneError: a plane that is needed is not in the folder.
        FormatError: not a checkpoint, an unknown version, or damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    checkpoint = Checkpoint.open(path)
    bits = checkpoint.require(checkpoint.quantization.bits if bits is None else bits)
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    config.quantization_config = {**config.quantization_config, "bits": bits}
    place = torch.device(device)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        config=config,
        dtype="auto" if dtype is None else dtype,
        device_map=None if place.type == "cpu" else {"": place},
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{checkpoint.path} lacks {missing[:4]}{' …' if len(missing) > 4 else ''}, which "
            f"{type(model).__name__} needs. Fetch it again, or use the transformers version that "
            "it was written with."
        )
    return model.eval()


def at(model: Any, bits: int) -> Any:
    """A view of a loaded model at another precision. Immutable, immediate, on the same storage.

    Every parameter and buffer of the view shares its memory with the base or its store; the base
    is not touched, and both can run at the same time in different threads. Tensors are shared,
    Parameter objects are not: `view.to(device)` moves the view alone.

    Args:
        model: what `load`, `from_pretrained` or `at` returned.
        bits: a level of the checkpoint, at most the number of planes in memory.

    Returns:
        A model of the same class.

    Raises:
        DropError: not a model of ours.
        PrecisionError: not a level of the checkpoint.
        MissingPlaneError: a level whose planes are not in memory.
    """
    store = store_of(model)
    prefix = store.checkpoint.quantization.check_level(bits)
    if prefix > store.loaded:
        raise MissingPlaneError(
            f"{bits} bits need planes 1..{prefix}, but only 1..{store.loaded} are in memory. Read "
            f"the others with dropbydrop.extend(model, {bits}), or load the model again with "
            f"dropbydrop.load({str(store.checkpoint.path)!r}, bits={bits})."
        )
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    # Compiled code and static caches of the base are bound to its precision: the view starts
    # without them.
    for name in ("_compiled_call", "_cache"):
        if name in model.__dict__:
            memo[id(model.__dict__[name])] = None
    view = copy.deepcopy(model, memo)
    for name in ("_compiled_call", "_cache"):
        view.__dict__.pop(name, None)
    for module in view.modules():
        if isinstance(module, NestedLinear):
            module._set_prefix(prefix)
    set_level_parameters(view, store, prefix)
    for config in {id(m.config): m.config for m in view.modules() if hasattr(m, "config")}.values():
        if isinstance(getattr(config, "quantization_config", None), DropByDropConfig):
            config.quantization_config = config.quantization_config.at(prefix)
    view.hf_quantizer.quantization_config = view.config.quantization_config
    return view


def precision(model: Any) -> int:
    """The precision P of a loaded model or view. It cannot be set; see `at`.

    Raises:
        DropError: not a model of ours.
    """
    store_of(model)
    return next(m.prefix for m in model.modules() if isinstance(m, NestedLinear))


def extend(model: Any, bits: int) -> None:
    """Read the planes up to `bits` into the store of a loaded model, so that `at` can use them.

    The model and its views keep their precision; this may run while they do.

    Raises:
        PrecisionError: `bits` is not a level of the checkpoint.
        MissingPlaneError, FormatError: a plane is not in the folder, or damaged.
    """
    store_of(model).extend(bits)


def store_of(model: Any) -> PlaneStore:
    """The store that a loaded model shares with its views.

    Raises:
        DropError: not a model of ours.
    """
    for module in model.modules():
        if isinstance(module, NestedLinear):
            return module.store
    raise DropError(
        f"{type(model).__name__} was not loaded from a dropbydrop checkpoint; load one with "
        "dropbydrop.load(folder, bits=…)."
    )
