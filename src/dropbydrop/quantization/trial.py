"""A trial of what quantizing and loading will ask of a model's code, before any work.

Some classes read `.weight` of a layer instead of calling it, in `_init_weights` or in a forward.
A loaded checkpoint has no such weight, so they could be quantized for hours and then not be loaded
or run. Families cannot be listed; what they do can be tried:

1. `_try_building`: the model on the meta device, with the very modules of a loaded checkpoint in
   place (`runtime.hf`), is initialised as `from_pretrained` does after reading, all tensors marked
   as read.
2. `_try_running`: each kind of block (same class, same linears) runs a few tokens with its real
   weights, then with every coded linear hidden behind a module that has no weight but computes the
   same. Both must give the same. The embedding and the head are hidden in the same way.

That also finds what only a later block does: routed experts, a linear that is called twice.
The trial opens the model for itself, so nothing of it stays in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from dropbydrop.checkpoint import Embeddings
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.embeddings import embedded_tokens
from dropbydrop.models.token_gradients import TokenGradients
from dropbydrop.runtime.hf import place_modules
from dropbydrop.runtime.int8_modules import RowView
from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError, UnsupportedModelError, first_line

from .config import QuantizeConfig

_TOKENS = 8


class _Hidden(nn.Module):
    """A module without a weight that computes what `module` does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._computes = [module]  # a list hides it from nn.Module
        for name in ("in_features", "out_features", "bias", "num_embeddings", "embedding_dim"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        if isinstance(module, nn.Embedding):  # as that of a loaded checkpoint
            weight = module.weight
            self.weight: Any = RowView(weight.shape, lambda ids: weight[ids], weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._computes[0](*args, **kwargs)


@torch.no_grad()
def try_model(runner: BlockRunner, config: QuantizeConfig, planes: tuple[Any, ...]) -> None:
    """See the module's note.

    Args:
        runner: of the model; it is left as it is.
        planes: those that the checkpoint will have.

    Raises:
        UnsupportedModelError: the model could not be quantized, loaded or run; says what fails.
    """
    again = BlockRunner.open(
        runner.files.folder, runner.dtype, runner.device, runner.batch_tokens, runner.files
    )
    with _told(again.model, "run block by block"):
        coded = _try_running(again, config.head_bits)
    del again
    gc.collect()  # a model is full of cycles, and would stay beside the one that is quantized
    with _told(runner.model, "loaded from a checkpoint"), quiet_transformers():
        _try_building(runner, config.head_bits, planes, coded)


@contextmanager
def _told(model: nn.Module, what: str) -> Iterator[None]:
    """An error of a model's code as one of ours."""
    try:
        yield
    except DropError:
        raise
    except Exception as error:  # whatever its code raises
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be {what} with its linear layers replaced by codes "
            f"({first_line(error)}). Its code in transformers asks more of a layer than to be "
            "called. With --head-bits 16 embedding and head stay as they are, which helps some; "
            "else use another model."
        ) from error


def try_gradients(runner: BlockRunner) -> str:
    """Why tokens cannot be weighted by gradients of the loss; "" where they can.

    Each kind of block runs a few tokens back and forth, the head too; `runner` is left as it is.
    """
    again = BlockRunner.open(
        runner.files.folder, runner.dtype, runner.device, runner.batch_tokens, runner.files
    )
    gradients, tried = TokenGradients(again), set[Any]()
    try:
        hidden = again.embed((torch.arange(_TOKENS) * 7 % embedded_tokens(again.model))[None])
        gradients.head(hidden, 0)
        for i, block in enumerate(again.blocks):
            kind = type(block), tuple(type(m) for m in block.modules())
            if kind not in tried:
                tried.add(kind)
                loaded, ones = again.block(i), torch.ones_like(hidden)
                back, squares = gradients.block(i, loaded, hidden, ones)
                again.release(i)
                if not squares or not all(map(_finite, (back, *squares.values()))):
                    return f"gradients of {again.block_prefix(i)} are not finite, or of no matrix"
    except Exception as error:  # whatever its code raises
        return f"{type(again.model).__name__} has no backward pass ({first_line(error)})"
    finally:
        del again
        gc.collect()
    return ""


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _try_running(runner: BlockRunner, head_bits: int) -> dict[str, tuple[int, int]]:
    """Run every kind of block; returns the shapes of all linears that will be coded, by name."""
    ids = (torch.arange(_TOKENS) * 7 % embedded_tokens(runner.model))[None]  # [1, T]
    hidden = runner.embed(ids)
    tried: dict[Any, list[str]] = {}  # kind of block -> coded linears by their names in the block
    shapes: dict[str, tuple[int, int]] = {}
    for i, block in enumerate(runner.blocks):
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        kind = type(block), tuple((n, m.out_features, m.in_features) for n, m in linears.items())
        prefix = f"{runner.block_prefix(i)}."
        if kind not in tried:
            loaded = runner.block(i)
            groups = runner.input_groups(i, loaded, hidden)
            called = [n.removeprefix(prefix) for g in groups for n in g.modules]
            tried[kind] = [n for n in called if n in linears]
            plain = runner.forward_block(i, loaded, hidden)
            with _hidden(loaded, tried[kind]):
                _check_same(runner.forward_block(i, loaded, hidden), plain)
            runner.release(i)
        for name in tried[kind]:
            shapes[prefix + name] = linears[name].out_features, linears[name].in_features
    if head_bits != 16:
        plain = runner.logits(hidden)
        with _hidden(runner.model, [*runner.embedding_modules, *runner.head_modules]):
            _check_same(runner.embed(ids), hidden)
            _check_same(runner.logits(hidden), plain)
    return shapes


def _check_same(found: Tensor, plain: Tensor) -> None:
    if not torch.allclose(found, plain, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError("other output")


@contextmanager
def _hidden(root: nn.Module, names: list[str]) -> Iterator[None]:
    """Hide modules of `root` behind others that have no weight."""
    before = {name: root.get_submodule(name) for name in names}
    for name, module in before.items():
        root.set_submodule(name, _Hidden(module))
    try:
        yield
    finally:
        for name, module in before.items():
            root.set_submodule(name, module)


def _try_building(
    runner: BlockRunner,
    head_bits: int,
    planes: tuple[Any, ...],
    shapes: dict[str, tuple[int, int]],
) -> None:
    """Build and initialise on meta what `load` would build."""
    with init_empty_weights(include_buffers=False):
        kind: Any = type(runner.model)
        model = kind._from_config(deepcopy(runner.model.config), dtype=runner.dtype)
    rows = [*runner.embedding_modules, *([] if runner.tied else runner.head_modules)]
    described: Any = SimpleNamespace(  # what is read of a checkpoint here
        shapes=shapes,
        rest={
            f"{name}.rows": SimpleNamespace(shape=tuple(model.get_submodule(name).weight.shape))
            for name in rows
        },
        quantization=SimpleNamespace(
            planes=planes,
            # tables in planes become modules with eight-bit rows
            embeddings=Embeddings(min(16, max(8, head_bits)), tuple(rows), runner.tied),
        ),
    )
    place_modules(model, described, len(planes), runner.dtype)
    for module in model.modules():  # building it has initialised it
        module._is_hf_initialized = False  # type: ignore[assignment]
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()
