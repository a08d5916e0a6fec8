"""Load a checkpoint at a precision.

A precision is a level (bits=3), an average (avg_bits=2.6), a `Plan`, or a budget (memory="1.5GiB").
A plan is loaded in two steps: the model at the plan's lowest level by transformers, then the
further planes of single input groups, or of single experts, into the store; the result is a view.
So no plane is read that is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.models.model_config import text_settings
from dropbydrop.planning.plan import Plan
from dropbydrop.planning.precision import Precision
from dropbydrop.planning.solver import levels_here, make_plan
from dropbydrop.system.errors import DropError, FormatError, PrecisionError, first_line

from . import upgrade as upgrades
from .hf import opened, register
from .views import store_of, view


def load(
    path: Path | str,
    bits: int | None = None,
    *,
    avg_bits: float | None = None,
    plan: Plan | None = None,
    memory: str | int | None = None,
    context: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    upgrade: bool = False,
    verify: bool = True,
) -> Any:
    """Load a checkpoint folder as an ordinary transformers model, in eval mode.

    At most one of `bits`, `avg_bits`, `plan` and `memory` is given; by default the model has the
    level its config names (the highest). Only planes in use are read; files of other planes need
    not exist.

    Args:
        path: a local checkpoint folder.
        bits: one of the checkpoint's levels.
        avg_bits: average bits a weight: the plan of least predicted loss.
        plan: a level for every input group, or for every expert of a stack.
        memory: what the model may take in all, in bytes or as "1.5GiB".
        context: tokens that `memory` is to suffice for [2048].
        dtype: type of the activations; by default that of the original model.
        device: where the tensors go.
        upgrade: go on reading the planes of higher levels on a background thread, waiting for
            those that a running `dropbydrop pull` still brings; see `dropbydrop.upgrade`.
        verify: compare all that decides the model with the hashes of its manifest.

    Returns:
        A `PreTrainedModel`; `generate`, `config` and `generation_config` are as usual.

    Raises:
        PrecisionError: `bits` is not a level of the checkpoint, the budget is infeasible, or more
            than one precision is given.
        MissingPlaneError: a plane that is needed is not in the folder.
        FormatError: not a checkpoint, an unknown version, damaged, edited, or replaced meanwhile; a
            plan for another one.
        DropError: a budget, but nothing is known about which matrices matter.
    """
    given = [x is not None for x in (bits, avg_bits, plan, memory)]
    if sum(given) > 1:
        raise PrecisionError("give at most one of bits, avg_bits, plan and memory.")
    asked = Precision(bits, avg_bits, plan) if any(given) and memory is None else None
    if upgrade:
        if any(given) and bits is None:
            raise PrecisionError("upgrade=True begins at a level: give bits, or nothing.")
        checkpoint = upgrades.open_when_ready(path, bits, verify)
    else:
        checkpoint = Checkpoint.open(path, verify)
    if memory is not None:
        resolved = make_plan(checkpoint, None, memory, context=context, dtype=dtype)
    else:
        resolved = (asked or Precision(checkpoint.quantization.bits)).resolve(checkpoint)
    checkpoint.require(resolved.highest)
    model = _load_level(checkpoint, resolved.lowest, dtype, device)
    if resolved.lowest < resolved.highest or resolved.table is not None:
        store_of(model).fill(resolved.planes_by_module(checkpoint))
        model = view(model, plan=resolved)
    if upgrade:
        upgrades.start(store_of(model))
    return model


def load_views(
    checkpoint: Checkpoint,
    chosen: Mapping[str, Precision] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, tuple[Plan, Any]]:
    """Several precisions of one checkpoint as views of one store: name -> its plan and its view.

    Args:
        chosen: name -> precision; by default every level whose planes are here.
        dtype: type of the activations; by default that of the original model.
        device: where the tensors go.

    Raises:
        As `load`, before anything is read.
    """
    if chosen is None:
        chosen = {str(p): Precision(p) for p in levels_here(checkpoint)}
    plans = {name: asked.resolve(checkpoint) for name, asked in chosen.items()}
    checkpoint.require(max(plan.highest for plan in plans.values()))
    base = _load_level(checkpoint, min(plan.lowest for plan in plans.values()), dtype, device)
    for plan in plans.values():
        store_of(base).fill(plan.planes_by_module(checkpoint))
    return {name: (plan, view(base, plan=plan)) for name, plan in plans.items()}


def upgrade(model: Any) -> upgrades.Upgrade:
    """The background reading of higher levels into a model's store; started if none is running.

        handle = dropbydrop.upgrade(model)
        handle.wait(4)                      # until 4 bits are in memory
        better = dropbydrop.view(model, 4)

    Raises:
        DropError: not a model of ours.
    """
    return upgrades.start(store_of(model))


def _check_depth(checkpoint: Checkpoint) -> None:
    """Refuse a config that asks for more blocks than there are matrices, before any is built."""
    depth = text_settings(checkpoint.config).get("num_hidden_layers")
    if isinstance(depth, int) and depth > len(checkpoint.quantization.modules):
        raise FormatError(
            f"config.json of {checkpoint.path} asks for {depth} blocks, the checkpoint has "
            f"{len(checkpoint.quantization.modules)} matrices. Damaged; fetch it again."
        )


def _load_level(
    checkpoint: Checkpoint, bits: int, dtype: torch.dtype | str | None, device: torch.device | str
) -> Any:
    """A model at one level, read by transformers."""
    from dropbydrop.models.pretrained import config_of, read_model

    register()
    _check_depth(checkpoint)
    place, token = torch.device(device), opened.set(checkpoint)
    try:
        config: Any = config_of(checkpoint.path)
        config.quantization_config = {**config.quantization_config, "bits": bits}
        loaded: Any = read_model(
            checkpoint.path,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=None if place.type == "cpu" else {"": place},
            output_loading_info=True,
        )
    except DropError:
        raise
    except Exception as error:  # a config can make transformers fail in any way
        raise FormatError(
            f"transformers cannot make a model of {checkpoint.path} ({first_line(error)}): its "
            "config.json is damaged, or this version of transformers does not know the model. "
            "Fetch it again, or use the version that it was written with."
        ) from error
    finally:
        opened.reset(token)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise FormatError(
            f"{checkpoint.path} lacks {missing[:4]}{' …' if len(missing) > 4 else ''}, which "
            f"{type(model).__name__} needs. Fetch it again, or use the transformers version that "
            "it was written with."
        )
    return model.eval()
