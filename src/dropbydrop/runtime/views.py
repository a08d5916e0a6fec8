"""Views: the same loaded model at other precisions, on the same storage.

    two = view(model, 2)                 its planes are in memory already: immediate
    load_planes(model, 4)                reads what 4 bits need into the store that both share
    four = view(model, 4)

A view is a model of the same class whose parameters and buffers share their memory with the model
it was made from, or with its `PlaneStore`. Nothing that exists is changed by making one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from dropbydrop.planning.levels import Level, each
from dropbydrop.planning.plan import Plan, average
from dropbydrop.planning.precision import Precision
from dropbydrop.system.errors import DropError, MissingPlaneError

from .hf import DropByDropConfig
from .int8_modules import NestedEmbedding, NestedHead
from .modules import NestedModule
from .plane_store import PlaneStore

_CACHES = ("_compiled_call", "_cache")  # bound to the precision of the model that has them


def view(
    model: Any,
    bits: int | None = None,
    *,
    avg_bits: float | None = None,
    plan: Plan | None = None,
) -> Any:
    """A view of a loaded model at another precision. Immutable, immediate, on the same storage.

    Every parameter and buffer of the view shares its memory with the base or its store; the base
    is not touched, and both can run at the same time in different threads. Tensors are shared,
    Parameter objects are not: `view.to(device)` moves the view alone. Exactly one precision is
    given, and its planes must be in memory.

    Args:
        model: what `load`, `from_pretrained` or `view` returned.
        bits: a level of the checkpoint.
        avg_bits: average bits a weight; planned with the planes that are in memory.
        plan: a level for every input group, or for every expert of a stack.

    Returns:
        A model of the same class.

    Raises:
        DropError: not a model of ours.
        PrecisionError: not a level of the checkpoint, or not exactly one precision.
        MissingPlaneError: a precision whose planes are not in memory.
        FormatError: a plan for another checkpoint.
    """
    store, asked = store_of(model), Precision(bits, avg_bits, plan)
    resolved = asked.resolve(store.checkpoint, planes=store.loaded)
    prefixes = _prefixes_in_memory(store, resolved, asked)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    for groups in {m.groups for m in model.modules() if isinstance(m, NestedModule)}:
        memo[id(groups)] = groups
    for name in _CACHES:
        if name in model.__dict__:
            memo[id(model.__dict__[name])] = None
    made = copy.deepcopy(model, memo)
    for name in _CACHES:
        made.__dict__.pop(name, None)
    for module in made.modules():
        if isinstance(module, NestedModule):
            module._set_count(prefixes[module.name])
        elif isinstance(module, (NestedEmbedding, NestedHead)) and module.source is not None:
            module.settle(module.rows.device, resolved.table_planes(store.checkpoint))
    for config in {id(m.config): m.config for m in made.modules() if hasattr(m, "config")}.values():
        if isinstance(getattr(config, "quantization_config", None), DropByDropConfig):
            config.quantization_config = config.quantization_config.with_bits(resolved.highest)
    made.hf_quantizer.quantization_config = made.config.quantization_config
    return made


def load_planes(model: Any, bits: int | None = None, *, plan: Plan | None = None) -> None:
    """Read the planes of a precision into the store of a loaded model, so that `view` can use them.

    The model and its views keep their precision; this may run while they do.

    Args:
        bits: a level: its planes of every matrix.
        plan: only the planes that it uses.

    Raises:
        DropError: not a model of ours.
        PrecisionError: not a level of the checkpoint, or neither or both are given.
        MissingPlaneError, FormatError: a plane is not in the folder, or damaged.
    """
    store = store_of(model)
    resolved = Precision(bits, plan=plan).resolve(store.checkpoint)
    store.fill(resolved.planes_by_module(store.checkpoint))


def precision(model: Any) -> int | float:
    """The precision of a loaded model or view: its level, or the average bits of its plan.

    It cannot be set; see `view`.

    Raises:
        DropError: not a model of ours.
    """
    found = _levels(model)
    if len(levels := {p for level in found.values() for p in each(level)}) == 1:
        return levels.pop()
    return average(found, store_of(model).checkpoint)


def plan_of(model: Any) -> Plan:
    """The level of every input group of a loaded model or view.

    Raises:
        DropError: not a model of ours.
    """
    checkpoint, found = store_of(model).checkpoint, _levels(model)
    input_groups = checkpoint.quantization.input_groups
    # a model without some of the modules (a bare decoder) still has a level for the others
    levels = {s.name: next((found[m] for m in s.modules if m in found), 0) for s in input_groups}
    rest = max(p for level in levels.values() for p in each(level))
    plan = Plan(checkpoint.fingerprint, {name: p or rest for name, p in levels.items()})
    for table in (m for m in model.modules() if isinstance(m, (NestedEmbedding, NestedHead))):
        if table.source is not None and table.source.count != plan.table_planes(checkpoint):
            bits = {n: bits for bits, n in checkpoint.quantization.embeddings.choices.items()}
            return replace(plan, table=bits[table.source.count])
    return plan


def _levels(model: Any) -> dict[str, Level]:
    """Quantized module -> the level that its planes are of (DropError: not a model of ours)."""
    store_of(model)
    return {m.name: m.level for m in model.modules() if isinstance(m, NestedModule)}


def store_of(model: Any) -> PlaneStore:
    """The store that a loaded model shares with its views.

    Raises:
        DropError: not a model of ours.
    """
    for module in model.modules():
        if isinstance(module, NestedModule):
            return module.store
    raise DropError(
        f"{type(model).__name__} was not loaded from a dropbydrop checkpoint; load one with "
        "dropbydrop.load(folder, bits=…)."
    )


def _prefixes_in_memory(store: PlaneStore, plan: Plan, asked: Precision) -> dict[str, Level]:
    """Planes of every module, all of them in memory (else MissingPlaneError)."""
    prefixes = plan.planes_by_module(store.checkpoint)
    lacking = [name for name, count in prefixes.items() if store.lacks(name, count)]
    if not lacking:
        return prefixes
    if asked.bits is not None:
        raise MissingPlaneError(
            f"{asked.bits} bits need planes 1..{prefixes[lacking[0]]}, but only "
            f"1..{store.loaded} are in memory. Read the others with "
            f"dropbydrop.load_planes(model, {asked.bits}), or load the model again with "
            f"dropbydrop.load({str(store.checkpoint.path)!r}, bits={asked.bits})."
        )
    raise MissingPlaneError(
        f"the plan needs plane {max(each(prefixes[lacking[0]]))} of {lacking[0]}"
        f"{f' and {len(lacking) - 1} more' if lacking[1:] else ''}, which is not in memory. Read "
        "it with dropbydrop.load_planes(model, plan=plan)."
    )
