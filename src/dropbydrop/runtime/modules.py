"""`NestedLinear`: a linear layer that runs from the first P planes of its codes.

    y = W x + b,   W = (scales * sum_{m<=P} C_m[index_m]) Q   (decoded, then back from x' = Q x)

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
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from dropbydrop import kernels
from dropbydrop.system.errors import PrecisionError, UnsupportedModelError

from .plane_store import GroupEntries, PlaneStore


def refuse_change(bits: int, value: object) -> NoReturn:
    """Raise the PrecisionError of an attempt to set the precision of a loaded model."""
    raise PrecisionError(
        f"the precision of a loaded model is fixed at {bits}; make a view of another precision "
        f"with dropbydrop.view(model, {value})."
    )


class Planes(nn.Module):
    """The container `codes` of a quantized module: parameters named "1".."P".

    Each is held once, in the layout of its device (`kernels.to_device_layout`): packed on a CPU
    with native kernels, else as stored. The latter is what state_dict gives.

    Attributes:
        specs: kind and shape of each.
        matrix: (d_out, d_in), or (E, d_out, d_in) of a stack of experts.
        packed: whether the planes are held packed.
    """

    def __init__(self, planes: Sequence[kernels.Plane]) -> None:
        super().__init__()
        self._set(planes)

    def _set(self, planes: Sequence[kernels.Plane]) -> None:
        first = planes[0]
        self.matrix, self.packed = first.matrix, first.packed
        self.specs = tuple(plane.spec for plane in planes)
        for m, plane in enumerate(planes, 1):
            self._parameters[str(m)] = nn.Parameter(plane.data, requires_grad=False)

    def __getitem__(self, m: int) -> Tensor:
        """Plane m as it is held, counted from 1."""
        return cast(Tensor, self._parameters[str(m)])

    def __len__(self) -> int:
        return len(self._parameters)

    @property
    def kind(self) -> str:
        """Kind of the planes."""
        return self.specs[0].kind

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self[1].device

    def held(self) -> tuple[kernels.Plane, ...]:
        """Planes 1..P as they are held."""
        *stack, d_out, d_in = self.matrix
        experts = stack[0] if stack else 0
        return tuple(
            kernels.Plane(self[m].detach(), spec, d_out, d_in, self.packed, experts)
            for m, spec in enumerate(self.specs, 1)
        )

    def to_stored(self) -> list[Tensor]:
        """Planes 1..P, uint8 of the shapes on disk; unpacked now if they are held packed."""
        return [plane.to_stored() for plane in self.held()]

    def _to_device_layout(self, codes: Tensor, m: int) -> kernels.Plane:
        return kernels.to_device_layout(codes, self.specs[m - 1], *self.matrix)

    def settle(self) -> None:
        """Bring planes that were just read, as stored, into the layout of their device."""
        self._set([self._to_device_layout(codes, m) for m, codes in enumerate(self.to_stored(), 1)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Planes:
        if fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device == self.device:
            return cast(Planes, super()._apply(fn, recurse))
        given = zip(self.to_stored(), self.specs, strict=True)
        self._set([kernels.Plane.stored(codes, spec, *self.matrix) for codes, spec in given])
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            for m, codes in enumerate(self.to_stored(), 1):
                destination[f"{prefix}{m}"] = codes

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mine = {f"{prefix}{m}": m for m in range(1, len(self) + 1)}
        if self.packed:
            state_dict = {
                k: self._to_device_layout(v, mine[k]).data if k in mine else v
                for k, v in state_dict.items()
            }
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


class NestedModule(FixedScales):
    """Matrices that are read from the first P planes of their codes: one (`NestedLinear`), or those
    of a stack of experts (experts.py).

    Attributes (on disk under the same names, see docs/format.md):
        codes: `Planes`, uint8 as stored in a state_dict.
        scales: float16 [d_out] or [E, d_out], the row scales of every level.
        bias: of the shape of `scales`, or None.
        store, name: where planes, codebooks and rotation are, and the key to them.
    """

    bias: nn.Parameter | None
    scales: Tensor
    _fixed = ("scales",)

    def __init__(self, store: PlaneStore, name: str, prefix: int, bias: Tensor | None) -> None:
        """Build the module of `name` on the meta device; transformers then loads its tensors."""
        super().__init__()
        self.store, self.name, self._prefix = store, name, prefix
        matrix = store.checkpoint.shapes[name]
        self.out_features, self.in_features = matrix[-2:]
        specs = store.checkpoint.quantization.planes[:prefix]
        codes = [torch.empty(p.shape(*matrix), dtype=torch.uint8, device="meta") for p in specs]
        given = zip(codes, specs, strict=True)
        self.codes = Planes([kernels.Plane.stored(plane, spec, *matrix) for plane, spec in given])
        scales = torch.empty(matrix[:-1], dtype=torch.float16, device="meta")
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))

    @property
    def prefix(self) -> int:
        """P, the number of planes this module reads. Read-only; see `dropbydrop.view`."""
        return self._prefix

    @prefix.setter
    def prefix(self, value: object) -> None:
        refuse_change(self.store.checkpoint.quantization.level_of(self._prefix), value)

    @property
    def input_group(self) -> GroupEntries:
        """Rotation and codebooks on this module's device, shared with its sister matrices."""
        return self.store.input_group(self.name, self.codes.device)

    def _set_prefix(self, prefix: int) -> None:
        """Turn a fresh copy into a view of `prefix` planes; for `dropbydrop.view` only."""
        codes = self.codes
        further = range(self._prefix + 1, prefix + 1)
        planes = [*codes.held()[:prefix]]
        planes += [self.store.plane(self.name, m).to(codes.device) for m in further]
        self.codes, self._prefix = Planes(planes), prefix

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"prefix={self._prefix}, bias={self.bias is not None}"
        )


class NestedLinear(NestedModule):
    """A linear layer that reads the first P planes of its codes."""

    def rotated_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' = W Q^-1 decoded from P planes: [d_out, d_in], for rotated inputs."""
        return prepared([self]).weight(0, dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W decoded from P planes, in the coordinates of the original model: [d_out, d_in]."""
        return self.input_group.rotation.transpose(self.rotated_weight()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out], in the dtype of x."""
        return prepared([self])(x)[0]


def group_of(modules: Sequence[nn.Module]) -> kernels.PreparedGroup:
    """Quantized linears that read one input, ready for their kernel; built once for all views.

    Raises:
        UnsupportedModelError: not quantized linears (dense ones, or with an adapter), or not of one
            input group and precision.
    """
    first = modules[0]
    for module in modules:
        if type(module) is not NestedLinear:
            raise UnsupportedModelError(f"{type(module).__name__} does not run from planes alone.")
        assert isinstance(first, NestedLinear)
        same = module.prefix == first.prefix and module.store is first.store
        if not same or module.input_group is not first.input_group:
            raise UnsupportedModelError(
                "matrices of one input with different codebooks or precisions run one by one."
            )
    return prepared(cast("Sequence[NestedLinear]", modules))


def books_of(module: NestedModule) -> kernels.Codebooks:
    """The codebooks of a module as kernels read them, one for all that share the set."""
    entries = module.input_group
    return cast(
        kernels.Codebooks,
        module.store.derived(
            ("books", entries.codebooks), lambda: kernels.prepare_codebooks(entries.books)
        ),
    )


def prepared(modules: Sequence[NestedLinear]) -> kernels.PreparedGroup:
    """Modules of one input group and precision on one device, ready for the kernel in use there."""
    first = modules[0]
    codes, store = first.codes, first.store
    device = codes.device
    _, kernel = kernels.backend_for(device.type, kind=codes.kind)

    def build() -> kernels.PreparedGroup:
        input_group = first.input_group
        books = books_of(first)
        matrices = [
            kernels.Matrix(m.codes.held(), m.scales, None if m.bias is None else m.bias.detach())
            for m in modules
        ]
        return kernels.prepare_group(matrices, books, input_group.rotation, first.prefix)

    names = tuple([module.name for module in modules])
    key = ("group", names, first.prefix, kernel, device, codes.packed)
    return cast(kernels.PreparedGroup, store.derived(key, build))
