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

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from dropbydrop import kernels
from dropbydrop.planning.levels import Level, each, mapped, of_expert
from dropbydrop.system.errors import PrecisionError, UnsupportedModelError

from .plane_store import GroupEntries, PlaneStore


def refuse_change(bits: Level, value: object) -> NoReturn:
    """Raise the PrecisionError of an attempt to set the precision of a loaded model."""
    raise PrecisionError(
        f"the precision of a loaded model is fixed at {bits}; make a view of another precision "
        f"with dropbydrop.view(model, {value})."
    )


Place = tuple[int, int | None]  # plane, and the expert where some experts of a stack lack it


def _key(m: int, expert: int | None) -> str:
    return str(m) if expert is None else f"{m}-{expert}"


class Planes(nn.Module):
    """The container `codes` of a quantized module: parameters named "1".."P".

    Each is held once, in the layout of its device (`kernels.to_device_layout`): packed on a CPU
    with native kernels, else as stored. The latter is what state_dict gives.

    A plane that only some experts of a stack read is a parameter for each, "3-17" of expert 17.

    Attributes:
        packed: whether the planes are held packed.
    """

    def __init__(self, planes: Mapping[Place, kernels.Plane]) -> None:
        """planes: in order, of every m from 1 on; all in one layout on one device."""
        super().__init__()
        self._set({_key(*place): plane for place, plane in planes.items()})

    def _set(self, planes: Mapping[str, kernels.Plane]) -> None:
        self.packed = planes["1"].packed
        self._forms = {key: (plane.spec, plane.matrix) for key, plane in planes.items()}
        for key, plane in planes.items():
            self._parameters[key] = nn.Parameter(plane.data, requires_grad=False)

    def __getitem__(self, m: int) -> Tensor:
        """Plane m as it is held, counted from 1."""
        return cast(Tensor, self._parameters[str(m)])

    def __len__(self) -> int:
        """P, of a stack that of the expert that has most."""
        return int(next(reversed(self._forms)).partition("-")[0])

    @property
    def kind(self) -> str:
        """Kind of the planes."""
        return self._forms["1"][0].kind

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self[1].device

    def _plane(self, key: str) -> kernels.Plane:
        spec, (*stack, d_out, d_in) = self._forms[key]
        data = cast(Tensor, self._parameters[key]).detach()
        return kernels.Plane(data, spec, d_out, d_in, self.packed, *stack)

    def plane(self, m: int, expert: int | None = None) -> kernels.Plane | None:
        """Plane m as it is held, of one expert of a stack if that is given; None if it is not."""
        if (whole := str(m)) in self._forms:
            plane = self._plane(whole)
            return plane if expert is None else plane.expert(expert)
        key = _key(m, expert)
        return self._plane(key) if key in self._forms else None

    def held(self, expert: int | None = None) -> tuple[kernels.Plane, ...]:
        """Planes 1..P as they are held, of one expert of a stack if that is given."""
        found = (self.plane(m, expert) for m in range(1, len(self) + 1))
        return tuple(plane for plane in found if plane is not None)

    def to_stored(self) -> list[Tensor]:
        """All planes, uint8 of the shapes on disk; unpacked now if they are held packed."""
        return [self._plane(key).to_stored() for key in self._forms]

    def _to_device_layout(self, codes: Tensor, key: str) -> kernels.Plane:
        spec, matrix = self._forms[key]
        return kernels.to_device_layout(codes, spec, *matrix)

    def settle(self) -> None:
        """Bring planes that were just read, as stored, into the layout of their device."""
        given = zip(self._forms, self.to_stored(), strict=True)
        self._set({key: self._to_device_layout(codes, key) for key, codes in given})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Planes:
        if fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device == self.device:
            return cast(Planes, super()._apply(fn, recurse))
        given = zip(self._forms.items(), self.to_stored(), strict=True)
        self._set({k: kernels.Plane.stored(c, spec, *matrix) for (k, (spec, matrix)), c in given})
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            for key, codes in zip(self._forms, self.to_stored(), strict=True):
                destination[f"{prefix}{key}"] = codes

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        held = (  # unpacked one by one, and only those that are given
            (name, self._parameters[key], self._plane(key).to_stored())
            for key in self._forms
            if (name := f"{prefix}{key}") in state_dict
        )
        super()._load_from_state_dict(_unchanged(held, state_dict, args[-1]), prefix, *args)


def _unchanged(
    held: Iterable[tuple[str, Tensor | None, Tensor | None]], state: Any, errors: list[str]
) -> dict[str, Any]:
    """A state, with what is held itself in place of what equals it.

    Views share it, and kernels have read it. Another state is an error, which torch raises.

    Args:
        held: name, tensor as it is held, and as it is in a state.
    """
    state = dict(state)
    for name, own, stored in held:
        given = state.get(name)
        if not isinstance(given, Tensor) or own is None or stored is None or own.is_meta:
            continue
        if given.shape != stored.shape or not torch.equal(given.to(stored), stored):
            errors.append(f"{name} is not that of this checkpoint; load the other one instead.")
        state[name] = own
    return state


class FixedScales(nn.Module):
    """Keeps float16 scales in float16 when the module is cast; devices change as usual. A state
    changes neither them nor what else is of the checkpoint."""

    _fixed: tuple[str, ...] = ()
    _kept: tuple[str, ...] = ()  # of a state, besides

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = (*self._fixed, *self._kept)
        own = ((f"{prefix}{n}", getattr(self, n, None), getattr(self, n, None)) for n in names)
        super()._load_from_state_dict(_unchanged(own, state_dict, args[-1]), prefix, *args)

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
        groups: what the kernels are called with.
    """

    bias: nn.Parameter | None
    scales: Tensor
    _fixed = ("scales",)

    def __init__(self, store: PlaneStore, name: str, prefix: int, bias: Tensor | None) -> None:
        """Build the module of `name` on the meta device; transformers then loads its tensors."""
        super().__init__()
        self.store, self.name, self.groups = store, name, store.groups
        self._count: Level = prefix
        matrix = store.checkpoint.shapes[name]
        self.out_features, self.in_features = matrix[-2:]
        specs = store.checkpoint.quantization.planes[:prefix]
        codes = [torch.empty(p.shape(*matrix), dtype=torch.uint8, device="meta") for p in specs]
        given = enumerate(zip(codes, specs, strict=True), 1)
        self.codes = Planes({(m, None): kernels.Plane.stored(*p, *matrix) for m, p in given})
        scales = torch.empty(matrix[:-1], dtype=torch.float16, device="meta")
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))

    @property
    def prefix(self) -> int:
        """P, the number of planes this module reads. Read-only; see `dropbydrop.view`. Of a stack
        whose experts differ it is that of the one that reads most."""
        return max(each(self._count))

    @prefix.setter
    def prefix(self, value: object) -> None:
        refuse_change(self.level, value)

    @property
    def level(self) -> Level:
        """The level that its planes are of, or those of its experts."""
        return mapped(self._count, self.store.checkpoint.quantization.level_of)

    @property
    def input_group(self) -> GroupEntries:
        """Rotation and codebooks on this module's device, shared with its sister matrices."""
        return self.store.input_group(self.name, self.codes.device)

    def _set_count(self, count: Level) -> None:
        """Turn a fresh copy into a view of so many planes, all of them in memory or in the store;
        for `dropbydrop.view` only."""
        codes, planes = self.codes, {}
        for m in range(1, max(each(count)) + 1):
            for e in self._places(m, count):
                plane = codes.plane(m, e)
                if plane is None:
                    plane = self.store.plane(self.name, m, e).to(codes.device)
                planes[m, e] = plane
        self.codes, self._count = Planes(planes), count

    def _places(self, m: int, count: Level) -> Sequence[int | None]:
        """What reads plane m of planes 1..count: the whole ([None]), or some experts."""
        whole = self.codes.plane(m) is not None or self.store.whole(self.name, m)
        if whole and all(p >= m for p in each(count)):
            return [None]
        return [e for e in range(len(self.scales)) if of_expert(count, e) >= m]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"prefix={self._count}, bias={self.bias is not None}"
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
        y = prepared([self])(x)[0]
        if trains_bias(self):  # kernels have no gradients; this adds 0 with the bias's
            assert self.bias is not None
            y = y + (self.bias - self.bias.detach()).to(y.dtype)
        return y


def trains_bias(module: NestedLinear) -> bool:
    """Whether gradients of its bias are wanted."""
    return module.bias is not None and module.bias.requires_grad and torch.is_grad_enabled()


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
    codes, device = first.codes, first.codes.device
    _, kernel = kernels.backend_for(device.type, kind=codes.kind)

    def build() -> kernels.PreparedGroup:
        input_group = first.input_group
        books = books_of(first)
        matrices = [
            kernels.Matrix(m.codes.held(), m.scales, None if m.bias is None else m.bias.detach())
            for m in modules
        ]
        return kernels.prepare_group(matrices, books, input_group.rotation, first.prefix)

    names = tuple([(m.name, None if m.bias is None else m.bias.dtype) for m in modules])
    key = names, first.prefix, kernel, device, codes.packed
    small = [x for m in modules for x in (m.scales, m.bias) if x is not None]
    return first.groups.get(key, small, build)
