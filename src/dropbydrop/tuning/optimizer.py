"""What is trained, as one flat float32 vector, and Adam on it.

Every trained tensor is `start + unit * a`: `start` is what the checkpoint stores, `unit` its size
(a row scale's own value; the root mean square of a codebook or of a norm's vector), and `a`, which
begins at 0, is what the optimizer moves. So one learning rate is a relative change a step and fits
scales of 0.001 and codebook entries of 2 alike.

    values   [n]     start + unit * a; the named tensors are views of it, leaves for autograd
    grad     [n]     their gradients are views of it, added up by autograd in place
    state    [3, n]  a, and Adam's two moments: all that a run needs to go on

Stored are float16 codebooks and scales, codebooks of trellis planes as integers and a scale
(grid.py), and norms in the type they came in. Training runs in float32; `rounded` is what is
stored, and what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .grid import rounded_part

_BETA1, _BETA2, _EPS = 0.9, 0.99, 1e-8
WARM_UP = 0.1  # of the steps


class Values:
    """Named trained tensors; see the module's note.

    Args:
        start: name -> the stored tensor, in the type it is stored in; of `grids`, their values.
        elementwise: names whose unit is the magnitude of every single value (row scales).
        device: where they are trained.
        grids: names of codebooks of trellis planes -> their largest integer.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        elementwise: set[str],
        device: torch.device,
        grids: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._grids = grids
        self.types = {name: tensor.dtype for name, tensor in start.items()}
        shapes = {name: tensor.shape for name, tensor in start.items()}
        flat = [t.to(device, torch.float32).reshape(-1) for t in start.values()]
        units = [
            t.abs() if name in elementwise else _rms(t).expand_as(t)
            for name, t in zip(start, flat, strict=True)
        ]
        self._start = torch.cat(flat) if flat else torch.empty(0, device=device)
        self._unit = torch.cat(units) if units else torch.empty(0, device=device)
        self.state = torch.zeros(3, self._start.numel(), device=device)
        self._values, self.grad = self._start.clone(), torch.zeros_like(self._start)
        self.leaves: dict[str, Tensor] = {}
        low = 0
        for name, shape in shapes.items():
            part = slice(low, low + math.prod(shape))
            leaf = self._values[part].view(shape).detach().requires_grad_()
            leaf.grad = self.grad[part].view(shape)
            self.leaves[name], low = leaf, part.stop

    @property
    def count(self) -> int:
        """Trained values."""
        return self._start.numel()

    @torch.no_grad()
    def step(self, number: int, rate: float) -> None:
        """One step of Adam (Kingma and Ba 2015) with what is in `grad`, which is then cleared.

        Args:
            number: of this step, from 1.
            rate: relative change that a steady gradient makes.
        """
        a, first, second = self.state
        gradient = self.grad * self._unit
        first.lerp_(gradient, 1 - _BETA1)
        second.lerp_(gradient.square(), 1 - _BETA2)
        size = (second / (1 - _BETA2**number)).sqrt_().add_(_EPS)
        a.addcdiv_(first, size, value=-rate / (1 - _BETA1**number))
        self.grad.zero_()
        self._set(a)

    @torch.no_grad()
    def restore(self, state: Tensor) -> None:
        """Go on from a copy of `state`."""
        self.state.copy_(state)
        self._set(self.state[0])

    def _set(self, a: Tensor) -> None:
        torch.addcmul(self._start, self._unit, a, out=self._values)

    @torch.no_grad()
    def rounded(self) -> dict[str, Tensor]:
        """The tensors as they will be stored, on the CPU."""
        out: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            if name in self._grids:
                part = rounded_part(leaf, self._grids[name])
                out |= {f"{name}{suffix}": tensor.cpu() for suffix, tensor in part.items()}
            else:
                out[name] = leaf.detach().to("cpu", self.types[name])
        return out


def _rms(values: Tensor) -> Tensor:
    size = values.square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def rate_at(step: int, steps: int, peak: float) -> float:
    """Learning rate of step 1..steps: linear warm-up over the first tenth, then a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return peak * step / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))
