"""Load a checkpoint at a precision, and make views of other precisions on the same storage.

A precision is a level (bits=3), an average (bits=2.6), a budget (memory="1.5GiB") or a `Plan`. A
plan is loaded in two steps: the model at the plan's lowest level by transformers, then the further
planes of single input groups into the store; the result is a view. So no plane is read that is not
used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from dropbydrop.planning.plan import Plan, fingerprint, levels_here, make_plan

from . import upgrade as upgrades
from .hf import DropByDropConfig, register, set_level_parameters
from .modules import NestedLinear
from .plane_store import PlaneStore


def load(
    path: Path | str,
    bits: int | float | Plan | None = None,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    upgrade: bool = False,
) -> Any:
    """Load a checkpoint folder as an ordinary transformers model, in eval mode.

    Only planes 1..bits are read; files of other planes need not exist.

    Args:
        path: a local checkpoint folder.
        bits: one of the checkpoint's levels (an int), an average number of bits (a float), or a
            `Plan`; by default the level its config names (the highest).
        memory: instead of bits: what the model may take in all, in bytes or as "1.5GiB".
        context: tokens that `memory` is to suffice for [2048].
        dtype: type of the activations; by default that of the original model.
        device: where the tensors go.
        upgrade: go on reading the planes of higher levels on a background thread, waiting for
            those that a running `dropbydrop pull` still brings; see `dropbydrop.upgrade`.

    Returns:
        A `PreTrainedModel`; `generate`, `config` and `generation_config` are as usual.

    Raises:
        PrecisionError: `bits` is not a level of the checkpoint, or the budget is infeasible.
        MissingPlaneError: a plane that is needed is not in the folder.
        FormatError: not a checkpoint, an unknown version, or damaged; a plan for another one.
        DropError: a budget, but nothing is known about which matrices matter.
    """
    if upgrade:
        if memory is not None or isinstance(bits, (float, Plan)):
            raise PrecisionError("upgrade=True begins at a level: give bits as a whole number.")
        checkpoint = upgrades.open_when_ready(path, bits)
    else:
        checkpoint = Checkpoint.open(path)
    if memory is None and not isinstance(bits, (float, Plan)):
        level = checkpoint.require(checkpoint.quantization.bits if bits is None else bits)
        model = _load_level(checkpoint, level, dtype, device)
        if upgrade:
            upgrades.start(store_of(model))
        return model
    if memory is not None and bits is not None:
        raise PrecisionError("give either bits or memory, not both.")
    if not isinstance(bits, Plan):
        bits = make_plan(checkpoint, bits, memory, context=context, dtype=dtype)
    plan = bits.check(checkpoint)
    checkpoint.require(plan.highest)
    base = _load_level(checkpoint, plan.lowest, dtype, device)
    store_of(base).fill(plan.by_module(checkpoint))
    return at(base, plan)


def _load_level(
    checkpoint: Checkpoint, bits: int, dtype: torch.dtype | str | None, device: torch.device | str
) -> Any:
    """A model at one level, read by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
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


def at(model: Any, bits: int | float | Plan) -> Any:
    """A view of a loaded model at another precision. Immutable, immediate, on the same storage.

    Every parameter and buffer of the view shares its memory with the base or its store; the base
    is not touched, and both can run at the same time in different threads. Tensors are shared,
    Parameter objects are not: `view.to(device)` moves the view alone.

    Args:
        model: what `load`, `from_pretrained` or `at` returned.
        bits: a level of the checkpoint (an int), an average (a float), or a `Plan`; its planes
            must be in memory.

    Returns:
        A model of the same class.

    Raises:
        DropError: not a model of ours.
        PrecisionError: not a level of the checkpoint.
        MissingPlaneError: a level or plan whose planes are not in memory.
        FormatError: a plan for another checkpoint.
    """
    store = store_of(model)
    if isinstance(bits, float):
        bits = make_plan(store.checkpoint, bits, planes=store.loaded)
    prefixes = _prefixes(store, bits)
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
    highest = max(prefixes.values())
    for name in ("_compiled_call", "_cache"):
        view.__dict__.pop(name, None)
    for module in view.modules():
        if isinstance(module, NestedLinear):
            module._set_prefix(prefixes[module.name])
    set_level_parameters(view, store, _nearest_level(store, prefixes))
    for config in {id(m.config): m.config for m in view.modules() if hasattr(m, "config")}.values():
        if isinstance(getattr(config, "quantization_config", None), DropByDropConfig):
            config.quantization_config = config.quantization_config.at(highest)
    view.hf_quantizer.quantization_config = view.config.quantization_config
    return view


def load_views(
    checkpoint: Checkpoint,
    chosen: Mapping[str, int | float | Plan] | None = None,
    dtype: torch.dtype | str | None = None,
) -> dict[str, tuple[Plan, Any]]:
    """Several precisions of one checkpoint as views of one store: name -> its plan and its view.

    Args:
        chosen: name -> level, average or plan; by default every level whose planes are here.

    Raises:
        As `load`, before anything is read.
    """
    if chosen is None:
        chosen = {str(p): p for p in levels_here(checkpoint)}
    plans: dict[str, Plan] = {}
    for name, bits in chosen.items():
        if isinstance(bits, Plan):
            plans[name] = bits.check(checkpoint)
        elif isinstance(bits, float):
            plans[name] = make_plan(checkpoint, bits)
        else:
            plans[name] = Plan.uniform(checkpoint, bits)
        checkpoint.require(plans[name].highest)
    lowest = min(plan.lowest for plan in plans.values())
    base = _load_level(checkpoint, lowest, dtype, "cpu")
    for plan in plans.values():
        extend(base, plan)
    return {name: (plan, at(base, plan)) for name, plan in plans.items()}


def _prefixes(store: PlaneStore, bits: int | Plan) -> dict[str, int]:
    """Planes of every module, all of them in memory (else MissingPlaneError)."""
    checkpoint = store.checkpoint
    if isinstance(bits, Plan):
        prefixes = bits.check(checkpoint).by_module(checkpoint)
        lacking = [name for name, p in prefixes.items() if p > store.held(name, p)]
        if lacking:
            raise MissingPlaneError(
                f"the plan needs plane {prefixes[lacking[0]]} of {lacking[0]}"
                f"{f' and {len(lacking) - 1} more' if lacking[1:] else ''}, which is not in "
                "memory. Read it with dropbydrop.extend(model, plan)."
            )
        return prefixes
    prefix = checkpoint.quantization.check_level(bits)
    if prefix > store.loaded:
        raise MissingPlaneError(
            f"{bits} bits need planes 1..{prefix}, but only 1..{store.loaded} are in memory. Read "
            f"the others with dropbydrop.extend(model, {bits}), or load the model again with "
            f"dropbydrop.load({str(checkpoint.path)!r}, bits={bits})."
        )
    return dict.fromkeys(checkpoint.quantization.modules, prefix)


def _average(store: PlaneStore, prefixes: Mapping[str, int]) -> float:
    """Planes a weight, averaged over the weights of these modules."""
    shapes = store.checkpoint.shapes
    weights = {name: shapes[name][0] * shapes[name][1] for name in prefixes}
    return sum(p * weights[name] for name, p in prefixes.items()) / sum(weights.values())


def _nearest_level(store: PlaneStore, prefixes: Mapping[str, int]) -> int:
    """The level nearest to the average of a plan: for parameters that are stored per level."""
    average = _average(store, prefixes)
    return min(store.checkpoint.levels, key=lambda level: (abs(level - average), level))


def precision(model: Any) -> int | float:
    """The precision of a loaded model or view: its level P, or the average planes of its plan.

    It cannot be set; see `at`.

    Raises:
        DropError: not a model of ours.
    """
    store = store_of(model)
    found = {m.name: m.prefix for m in model.modules() if isinstance(m, NestedLinear)}
    levels = set(found.values())
    return levels.pop() if len(levels) == 1 else _average(store, found)


def plan_of(model: Any) -> Plan:
    """The level of every input group of a loaded model or view.

    Raises:
        DropError: not a model of ours.
    """
    checkpoint = store_of(model).checkpoint
    found = {m.name: m.prefix for m in model.modules() if isinstance(m, NestedLinear)}
    input_groups = checkpoint.quantization.input_groups
    # a model without some of the modules (a bare decoder) still has a level for the others
    levels = {s.name: next((found[m] for m in s.modules if m in found), 0) for s in input_groups}
    rest = max(levels.values())
    return Plan(fingerprint(checkpoint), {name: p or rest for name, p in levels.items()})


def extend(model: Any, bits: int | Plan) -> None:
    """Read the planes up to `bits` into the store of a loaded model, so that `at` can use them.

    The model and its views keep their precision; this may run while they do.

    Args:
        bits: a level, or a plan: then only the planes that it uses.

    Raises:
        PrecisionError: `bits` is not a level of the checkpoint.
        MissingPlaneError, FormatError: a plane is not in the folder, or damaged.
    """
    store = store_of(model)
    if isinstance(bits, Plan):
        store.fill(bits.check(store.checkpoint).by_module(store.checkpoint))
    else:
        store.extend(bits)


def upgrade(model: Any) -> upgrades.Upgrade:
    """The background reading of higher levels into a model's store; started if none is running.

        handle = dropbydrop.upgrade(model)
        handle.wait(4)                      # until 4 bits are in memory
        better = dropbydrop.at(model, 4)

    Raises:
        DropError: not a model of ours.
    """
    return upgrades.start(store_of(model))


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
