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
- Modules may hold different numbers of planes: a plan reads no more than it uses.
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

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import Plane, to_device_layout
from dropbydrop.system.errors import DropError


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


class PlaneStore:
    """Codes, codebooks, rotations and derived layouts of one opened checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.RLock()
        self._filling = threading.Lock()  # held for as long as planes are read from disk
        self._planes: dict[tuple[str, int], Plane] = {}
        self._modules: dict[str, torch.device] = {}
        self._held: dict[str, int] = {}  # module -> planes in memory
        self._derived: dict[Hashable, Any] = {}
        self._shared: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
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
        return min(self._held.values(), default=0)

    def held(self, module: str, absent: int = 0) -> int:
        """Number of planes of one module in memory; `absent` for one that the model lacks."""
        return self._held.get(module, absent)

    def plane(self, module: str, m: int) -> Plane:
        """Plane m of a module as it is held (KeyError if not in memory)."""
        return self._planes[module, m]

    def add(self, module: str, planes: Sequence[Plane]) -> None:
        """Register planes 1..P of a module, as held; called once per module while loading."""
        with self._lock:
            if module in self._modules:
                raise ValueError(f"{module} is already in this store")
            for m, plane in enumerate(planes, 1):
                self._planes[module, m] = plane
            self._modules[module], self._held[module] = planes[0].data.device, len(planes)

    def fill(self, prefixes: Mapping[str, int], stop: Callable[[], bool] = lambda: False) -> None:
        """Read further planes, so that views of more planes can be made. Thread-safe.

        Memory grows by the new planes only. Those of one number become available together: views
        that run meanwhile never see a plane that some modules lack.

        Args:
            prefixes: module -> number of planes that will be in memory.
            stop: asked between two tensors; when it says yes, the plane at hand is dropped.

        Raises:
            MissingPlaneError, FormatError: a plane is absent or damaged.
        """
        self.checkpoint.require_planes(max(prefixes.values()))
        with self._filling:
            lacking = {n: p for n, p in prefixes.items() if self.held(n, p) < p}
            for m in range(1, max(lacking.values(), default=0) + 1):
                modules = [n for n, p in lacking.items() if self._held[n] < m <= p]
                new = self._read_plane(m, modules, stop) if modules else {}
                if stop():
                    return
                with self._lock:
                    self._planes.update(new)
                    self._held.update(dict.fromkeys(modules, m))

    def _read_plane(
        self, m: int, modules: list[str], stop: Callable[[], bool]
    ) -> dict[tuple[str, int], Plane]:
        """A plane's tensors, in memory whatever happens to the file afterwards, as views hold them.

        Each is compared with the manifest as it is read, and packed on this thread, before anyone
        can see it.
        """
        spec, new = self.checkpoint.quantization.planes[m - 1], {}
        for module in modules:
            if stop():
                return {}
            codes = self.checkpoint.read_codes(module, m).to(self._modules[module], copy=True)
            new[module, m] = to_device_layout(codes, spec, *self.checkpoint.shapes[module])
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
