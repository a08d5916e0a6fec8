"""One store of planes for all views of a checkpoint.

A model loaded at P bits and every view made from it share one `PlaneStore`: codes per module and
plane, the codebooks, the rotations, and what kernels derive from them. Views hold references; the
store is never copied (`copy.deepcopy` returns it), so a view costs no memory of its own. A plane is
held once, in the layout that its device reads (`kernels.to_device_layout`): packed for the native
CPU kernels, else as on disk.

Rules that make sharing safe:
- What is in the store is never changed, only added to. Values handed out are immutable.
- Planes can be added while views run (`fill`): a view keeps its own prefix. They are read
  without the lock that views may need, and show up all together.
- Modules may hold different numbers of planes: a plan reads no more than it uses. So may the
  experts of a stack: a plane that all of them read is one tensor, one that some of them read is a
  tensor for each (a *piece*), and only their bytes are read. Neither becomes the other: a plane
  whose pieces are completed later stays in pieces.
- Everything is computed at most once, under a lock; readers take no lock once it is there.

Limit: planes stay on the device they were loaded to. `model.to(device)` moves the model, and the
store keeps its own copy; `load(..., device=...)` avoids that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import Plane, PreparedGroup, to_device_layout
from dropbydrop.planning.levels import Level, canonical, each, of_expert
from dropbydrop.system.errors import DropError

_Place = tuple[str, int, int | None]  # module, plane, and the expert of a piece


@dataclass(frozen=True, eq=False)
class GroupEntries:
    """What the matrices of one input group share, on one device. Immutable.

    q/k/v of a block get the identical object, so that code which rotates or builds tables from
    their common input can do it once (compare with `is`) without keeping state between calls.

    Attributes:
        name: its name in the checkpoint.
        codebooks: name of its codebook set; equal names share the identical `books`.
        rotation: x -> x' of this input group.
        books: what the codes mean; all planes, whatever the view's prefix.
    """

    name: str
    codebooks: str
    rotation: Rotation
    books: CodebookSet


class PreparedGroups:
    """Input groups as kernels are called with them, of one model and its views: they hold its own
    tensors, so `copy.deepcopy` of a model, whose tensors are copies, begins with none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._found: dict[Hashable, tuple[_Small, PreparedGroup]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedGroups:
        return PreparedGroups()

    def get(
        self, key: Hashable, small: Sequence[Tensor], build: Callable[[], PreparedGroup]
    ) -> PreparedGroup:
        """The group of `key`, built again when its biases or scales are others, or changed: they
        alone may after loading."""
        found = self._found.get(key)
        if found is None or not found[0].same(small):
            with self._lock:
                found = self._found.get(key)
                if found is None or not found[0].same(small):
                    found = self._found[key] = _Small(small), build()
        return found[1]


class _Small:
    """What the small tensors of a group were when it was prepared."""

    def __init__(self, small: Sequence[Tensor]) -> None:
        self._tensors, self._state = tuple(small), self._read(small)

    def same(self, small: Sequence[Tensor]) -> bool:
        if torch.compiler.is_compiling():  # which knows objects, and neither addresses nor versions
            return all(a is b for a, b in zip(self._tensors, small, strict=True))
        if self._state != self._read(small):
            return False
        self._tensors = tuple(small)  # a view has objects of its own
        return True

    @staticmethod
    def _read(small: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(x.data_ptr(), -1 if x.is_inference() else x._version) for x in small]


class PlaneStore:
    """Codes, codebooks, rotations and derived layouts of one opened checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.RLock()
        self._filling = threading.Lock()  # held for as long as planes are read from disk
        self._planes: dict[_Place, Plane] = {}
        self._modules: dict[str, torch.device] = {}
        self._held: dict[str, Level] = {}  # module -> planes in memory, or those of each expert
        self._derived: dict[Hashable, Any] = {}
        self._shared: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self.groups = PreparedGroups()  # of the model that was loaded
        self.upgrade: Any = None  # an upgrades.Upgrade, when one was started

    def __deepcopy__(self, memo: dict[int, Any]) -> PlaneStore:
        return self

    def __copy__(self) -> PlaneStore:
        return self

    def __reduce__(self) -> NoReturn:
        raise DropError(
            "a loaded dropbydrop model cannot be pickled (torch.save, multiprocessing); load its "
            f"folder {self.checkpoint.path} again where it is needed."
        )

    @property
    def loaded(self) -> int:
        """Number of planes in memory of every module: 1..loaded can be served."""
        return min((p for count in self._held.values() for p in each(count)), default=0)

    def lacks(self, module: str, count: Level) -> bool:
        """Whether planes 1..count of a module are not in memory; a module that the model does not
        have lacks nothing."""
        held = self._held.get(module, count)
        return any(
            of_expert(held, e) < of_expert(count, e)
            for e in range(max(len(each(held)), len(each(count))))
        )

    def whole(self, module: str, m: int) -> bool:
        """Whether plane m of a module is held as one tensor."""
        return (module, m, None) in self._planes

    def plane(self, module: str, m: int, expert: int | None = None) -> Plane:
        """Plane m of a module, or of one of its experts, as held (KeyError if not in memory)."""
        found = self._planes.get((module, m, None))
        if found is not None:
            return found if expert is None else found.expert(expert)
        return self._planes[module, m, expert]

    def add(self, module: str, planes: Sequence[Plane]) -> None:
        """Register planes 1..P of a module, as held; called once per module while loading."""
        with self._lock:
            if module in self._modules:
                raise ValueError(f"{module} is already in this store")
            for m, plane in enumerate(planes, 1):
                self._planes[module, m, None] = plane
            self._modules[module], self._held[module] = planes[0].data.device, len(planes)

    def fill(self, prefixes: Mapping[str, Level], stop: Callable[[], bool] = lambda: False) -> None:
        """Read further planes, so that views of more planes can be made. Thread-safe.

        Memory grows by the new planes only. Those of one number become available together: views
        that run meanwhile never see a plane that some modules lack.

        Args:
            prefixes: module -> number of planes that will be in memory, or that of each expert.
            stop: asked between two tensors; when it says yes, the plane at hand is dropped.

        Raises:
            MissingPlaneError, FormatError: a plane is absent or damaged.
        """
        most = max(p for count in prefixes.values() for p in each(count))
        self.checkpoint.require_planes(most)
        with self._filling:
            lacking = {n: p for n, p in prefixes.items() if self.lacks(n, p)}
            for m in range(1, most + 1 if lacking else 1):
                places = [place for n, p in lacking.items() for place in self._missing(n, m, p)]
                new = self._read_plane(places, stop)
                if stop():
                    return
                with self._lock:
                    self._planes.update(new)
                    self._held |= {module: self._after(new, module, m) for module, _, _ in new}

    def _missing(self, module: str, m: int, count: Level) -> list[_Place]:
        """Where plane m is missing for planes 1..count: of the module, or of some experts."""
        held, experts = self._held[module], self._experts(module)
        if not experts:
            return [(module, m, None)] if of_expert(held, 0) < m <= of_expert(count, 0) else []
        lacking = [e for e in range(experts) if of_expert(held, e) < m <= of_expert(count, e)]
        if len(lacking) == experts:
            return [(module, m, None)]
        return [(module, m, e) for e in lacking]

    def _after(self, new: Mapping[_Place, Plane], module: str, m: int) -> Level:
        """What is in memory of a module when the new planes, of number m, are."""
        if (module, m, None) in new:
            return m
        held = self._held[module]
        return canonical(
            m if (module, m, e) in new else of_expert(held, e) for e in range(self._experts(module))
        )

    def _experts(self, module: str) -> int:
        """E of a stack, 0 of a matrix."""
        shape = self.checkpoint.shapes[module]
        return shape[0] if len(shape) == 3 else 0

    def _read_plane(self, places: list[_Place], stop: Callable[[], bool]) -> dict[_Place, Plane]:
        """A plane's tensors, in memory whatever happens to the file afterwards, as views hold them.

        Each is compared with the manifest as it is read, and packed on this thread, before anyone
        can see it.
        """
        new = {}
        for place in places:
            if stop():
                return {}
            module, m, expert = place
            spec, shape = self.checkpoint.quantization.planes[m - 1], self.checkpoint.shapes[module]
            codes = self.checkpoint.read_codes(module, m, expert)
            codes = codes.to(self._modules[module], copy=True)
            matrix = shape if expert is None else shape[1:]
            new[place] = to_device_layout(codes, spec, *matrix)
        return new

    def input_group(self, module: str, device: torch.device) -> GroupEntries:
        """What the input group of a module shares on `device`: one object for each."""
        index = self.checkpoint.quantization.group_index[module]
        return self.derived(("input group", index, device), lambda: self._make_group(index, device))

    def derived(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """The value of `key`, built at most once for all views.

        For codebooks, the descriptions that kernels are called with, and the like; not for copies
        of planes. Keys must name everything the value depends on (module, plane, device, layout);
        values must not be changed afterwards. `build` may call `derived` for other keys.
        """
        value = self._derived.get(key)
        if value is None:
            with self._lock:
                value = self._derived.get(key)
                if value is None:
                    value = self._derived[key] = build()
        return value

    def shared(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """As `derived`, but kept only while somebody holds it: for what one precision needs."""
        with self._lock:
            value = self._shared.get(key)
            if value is None:
                value = self._shared[key] = build()
            return value

    def _make_group(self, index: int, device: torch.device) -> GroupEntries:
        spec = self.checkpoint.quantization.input_groups[index]
        name = spec.codebooks
        books = self.derived(
            ("codebook set", name, device), lambda: self.checkpoint.read_set(name).to(device)
        )
        return GroupEntries(spec.name, name, self.checkpoint.read_rotation(index).to(device), books)
