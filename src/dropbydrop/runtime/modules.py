"""`NestedLinear`: a linear layer that runs from the first P planes of its codes.

    y = W x + b,   W = (scales * sum_{m<=P} C_m[codes_m]) Q   (decoded, then back from x' = Q x)

A module registers the codes of its own P planes as parameters (uint8, so never trained by
accident) and its scales as buffers; their names are the tensors' names in the checkpoint. The
codebooks, the rotation and all other planes are in the shared `PlaneStore`. P never changes after
construction: another precision is another view (`dropbydrop.view`).

Numerics. Activations may be float64, float32, bfloat16 or float16. The rotation runs in float32
for the 16-bit types and its result is rounded once to the activation's type: each Hadamard stage
in 16 bits would add a rounding of its own. Weights are summed and scaled in float32 and rounded
once to the activation's type. Scales are buffers of fixed type float16: `model.to(dtype)` leaves
them alone (bfloat16 would cost them three bits), and `model.dtype`, which transformers takes from
the first floating-point parameter, stays the type of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropbydrop import kernels
from dropbydrop.coding.code import GROUP, decode
from dropbydrop.errors import PrecisionError, UnsupportedModelError
from dropbydrop.kernels.cpu.products import FEW

from .plane_store import GroupEntries, PlaneStore


class Planes(nn.Module):
    """The container `codes` of a NestedLinear: parameters named "1".."P".

    Each is held once, in the form that its device reads (`kernels.keep`): packed bytes on a CPU
    with native kernels, else uint8 [d_out, G]. The latter is what state_dict gives, as on disk.
    """

    def __init__(self, planes: list[Tensor], rows: int, groups: int) -> None:
        super().__init__()
        self.rows, self.groups = rows, groups
        self._set(planes)

    def _set(self, planes: list[Tensor]) -> None:
        for m, codes in enumerate(planes, 1):
            self._parameters[str(m)] = nn.Parameter(codes, requires_grad=False)

    def __getitem__(self, m: int) -> Tensor:
        """Plane m as it is held, counted from 1."""
        return cast(Tensor, self._parameters[str(m)])

    def __len__(self) -> int:
        return len(self._parameters)

    def tensors(self) -> list[Tensor]:
        """Planes 1..P as they are held."""
        return [self[m].detach() for m in range(1, len(self) + 1)]

    def to_row_major(self) -> list[Tensor]:
        """Planes 1..P, uint8 [d_out, G] each; unpacked now if they are held packed."""
        return [kernels.to_row_major(plane, self.rows, self.groups) for plane in self.tensors()]

    def settle(self) -> None:
        """Bring planes that were just read into the form of their device."""
        self._set([kernels.keep(plane) for plane in self.to_row_major()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Planes:
        device = self[1].device
        if fn(torch.empty(0, dtype=torch.uint8, device=device)).device == device:
            return cast(Planes, super()._apply(fn, recurse))
        self._set(self.to_row_major())
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for m, plane in enumerate(self.tensors(), 1):
            if plane.dim() == 1:
                codes = kernels.to_row_major(plane, self.rows, self.groups)
                destination[f"{prefix}{m}"] = codes

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mine = {f"{prefix}{m}" for m in range(1, len(self) + 1)}
        if self[1].dim() == 1:
            state_dict = {k: kernels.keep(v) if k in mine else v for k, v in state_dict.items()}
        super()._load_from_state_dict(state_dict, prefix, *args)


class FixedScales(nn.Module):
    """Keeps float16 scales in float16 when the module is cast; devices change as usual."""

    _fixed: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedScales:
        fixed = [self._buffers.get(name) for name in self._fixed]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if any(tensor is scale for scale in fixed) and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        return super()._apply(moved, recurse)


class NestedLinear(FixedScales):
    """A linear layer that reads the first P planes of its codes.

    Attributes (on disk under the same names, see docs/format.md):
        codes: `Planes`, uint8 [d_out, G] each in a state_dict.
        scales: float16 [d_out], the row scales of every level.
        bias: [d_out] or None.
        store, name: where planes, codebooks and rotation are, and the key to them.
    """

    bias: nn.Parameter | None
    _fixed = ("scales",)

    def __init__(self, store: PlaneStore, name: str, prefix: int, bias: Tensor | None) -> None:
        """Build the module of `name` on the meta device; transformers then loads its tensors."""
        super().__init__()
        self.store, self.name, self._prefix = store, name, prefix
        self.out_features, self.in_features = store.checkpoint.shapes[name]
        grid = (self.out_features, self.in_features // GROUP)
        codes = torch.empty(grid, dtype=torch.uint8, device="meta")
        self.codes = Planes([codes] * prefix, *grid)
        scales = torch.empty(self.out_features, dtype=torch.float16, device="meta")
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))

    @property
    def prefix(self) -> int:
        """P, the number of planes this module reads. Read-only; see `dropbydrop.view`."""
        return self._prefix

    @prefix.setter
    def prefix(self, value: object) -> None:
        raise PrecisionError(
            f"the precision of a loaded model is fixed at {self._prefix}; make a view of another "
            f"precision with dropbydrop.view(model, {value})."
        )

    @property
    def input_group(self) -> GroupEntries:
        """Rotation and codebooks on this module's device, shared with its sister matrices."""
        return self.store.input_group(self.name, self.codes[1].device)

    @property
    def row_scales(self) -> Tensor:
        """The row scales: float16 [d_out]."""
        return cast(Tensor, self.scales)

    def rotated_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' = W Q^-1 decoded from P planes: [d_out, d_in], for rotated inputs."""
        if self.codes[1].is_cpu and not kernels.gpu_kernel("cpu"):
            return _prepared_group(self).weight(dtype)
        return decode(
            self.codes.tensors(), self.input_group.entries, self.row_scales, self._prefix, dtype
        )

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W decoded from P planes, in the coordinates of the original model: [d_out, d_in]."""
        return self.input_group.rotation.transpose(self.rotated_weight()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out], in the dtype of x."""
        return _multiply(self, x)

    def _set_prefix(self, prefix: int) -> None:
        """Turn a fresh copy into a view of `prefix` planes; for `dropbydrop.view` only."""
        codes, device = self.codes, self.codes[1].device
        planes = codes.tensors()[:prefix]
        for m in range(self._prefix + 1, prefix + 1):
            plane = self.store.codes(self.name, m)
            if plane.device != device:
                row_major = kernels.to_row_major(plane, codes.rows, codes.groups)
                plane = kernels.keep(row_major.to(device))
            planes.append(plane)
        self.codes, self._prefix = Planes(planes, codes.rows, codes.groups), prefix

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"prefix={self._prefix}, bias={self.bias is not None}"
        )


def _multiply(module: NestedLinear, x: Tensor) -> Tensor:
    """y = W x + b. The one place where a kernel is chosen.

    On the CPU a few rows go through tables of dot products. More rows decode slabs of the matrix,
    also where entries would still be a little faster: prompts and evaluation are then exact to
    float rounding. On CUDA `kernels.cuda` does the like. Other devices, and the kernel "torch",
    decode and multiply.
    """
    if kernel := kernels.gpu_kernel(x.device.type):
        return cuda_group([module], kernel)(x)[0]
    if x.is_cpu:
        prepared = _prepared_group(module)
        return (prepared if x.numel() <= FEW * x.shape[-1] else prepared.dense)(x)[0]
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    rotated = module.input_group.rotation.apply(wide).to(x.dtype)
    bias = module.bias if module.bias is None else module.bias.to(x.dtype)
    return F.linear(rotated, module.rotated_weight(x.dtype), bias)


def cuda_group(modules: Sequence[NestedLinear], kernel: str) -> kernels.cuda.CudaGroup:
    """Modules of one input group and precision, ready for a GPU kernel; built once for all views.

    Args:
        modules: they have the same `input group` and `prefix`.
        kernel: the name of a kernel of `kernels.cuda`.
    """
    first = modules[0]
    store, device = first.store, first.codes[1].device

    def build() -> kernels.cuda.CudaGroup:
        input_group = first.input_group
        entries = store.derived(
            ("gpu tables", input_group.codebooks, device),
            lambda: kernels.cuda.device_tables(input_group.entries, device),
        )
        matrices = [_row_major(module) for module in modules]
        return kernels.cuda.CudaGroup(matrices, entries, input_group.rotation, first.prefix, kernel)

    key = ("gpu", *[module.name for module in modules], first.prefix, kernel, device)
    return cast(kernels.cuda.CudaGroup, store.derived(key, build))


def _row_major(module: NestedLinear) -> kernels.Matrix:
    """A module's matrix from planes that are held as they are on disk."""
    planes = tuple(plane.detach() for plane in module.codes.tensors())
    packed = kernels.Packed(planes, module.out_features, module.in_features // GROUP, False)
    bias = None if module.bias is None else module.bias.detach()
    return kernels.Matrix(packed, module.row_scales, bias)


def prepared_group_of(module: nn.Module) -> kernels.PreparedGroup:
    """A quantized linear's matrix, ready for the kernels; built once in the store for all views.

    Raises:
        UnsupportedModelError: not a quantized linear (a dense one, or one with an adapter).
    """
    if type(module) is not NestedLinear:
        raise UnsupportedModelError(f"{type(module).__name__} does not run from planes alone.")
    return _prepared_group(module)


def _prepared_group(module: NestedLinear) -> kernels.PreparedGroup:
    store, name, prefix = module.store, module.name, module.prefix
    tiled = module.codes[1].dim() == 1

    def build() -> kernels.PreparedGroup:
        input_group = module.input_group
        books = store.derived(
            ("books", input_group.codebooks),
            lambda: kernels.prepare_codebooks(input_group.entries, input_group.sign_symmetric),
        )
        planes = tuple(module.codes.tensors())
        packed = kernels.Packed(planes, module.out_features, module.in_features // GROUP, tiled)
        bias = None if module.bias is None else module.bias.detach()
        matrix = kernels.Matrix(packed, module.row_scales, bias)
        return kernels.PreparedGroup([matrix], books, input_group.rotation, prefix)

    key = ("bound", name, prefix, tiled, kernels.select().name)
    return cast(kernels.PreparedGroup, store.derived(key, build))
