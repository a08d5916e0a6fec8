"""Planes that arrive while a model already answers.

`dropbydrop.load(path, bits=2, upgrade=True)` returns a model at 2 bits and starts one background
thread, which reads the planes of the next level into the store, then those of the level after,
until the checkpoint's highest. Every level that is complete can be had with `view(model, bits)` at
once; nothing that runs is stopped or changed. Memory grows by the new planes only.

The folder may still be filling: while a `pull` works on it, the thread waits for files to appear
(checkpoint/pull.py gives a file its name only when it is whole and verified). When no pull is
running and a plane is absent, the upgrade ends at the level it has reached, and `wait` for more
says why.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import CONFIG_FILE, MANIFEST_FILE, REST_FILE
from dropbydrop.planning.plan import Plan
from dropbydrop.system.errors import DropError
from dropbydrop.system.paths import given

from .plane_store import PlaneStore

_POLL = 0.05  # seconds between two looks at the folder
_starting = threading.Lock()


class Upgrade:
    """The background reading of one store. Daemon thread: it never keeps a program alive.

    Attributes (to be read):
        level: the highest precision that `view` can serve now.
        done: whether the thread has ended: everything read, stopped, or a plane that does not come.
    """

    def __init__(self, store: PlaneStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: DropError | None = None
        self.level = store.checkpoint.quantization.level_of(store.loaded)
        self.done = False
        self._thread = threading.Thread(target=self._run, name="dropbydrop-upgrade", daemon=True)
        self._thread.start()

    def wait(self, bits: int, timeout: float | None = None) -> bool:
        """Wait until precision `bits` is in memory. False when `timeout` seconds were not enough.

        Raises:
            PrecisionError: not a level of the checkpoint.
            MissingPlaneError, FormatError: its planes are absent and no pull is bringing them, or
                damaged.
            DropError: the upgrade was stopped before.
        """
        self._store.checkpoint.quantization.check_level(bits)
        with self._changed:
            self._changed.wait_for(lambda: self.level >= bits or self.done, timeout)
            if self.level >= bits:
                return True
            if self._error is not None:
                raise self._error
            if self.done:
                raise DropError(f"the upgrade was stopped at {self.level} bits, before {bits}.")
            return False

    def stop(self) -> None:
        """End the thread; planes that are complete stay in memory."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            checkpoint = self._store.checkpoint
            for bits in (p for p in checkpoint.levels if p > self.level):
                wait_for_planes(checkpoint, bits, self._stop)
                planes = Plan.uniform(checkpoint, bits).planes_by_module(checkpoint)
                self._store.fill(planes, self._stop.is_set)
                if self._stop.is_set():
                    break
                with self._changed:
                    self.level = bits
                    self._changed.notify_all()
        except DropError as failure:
            self._error = failure
        except OSError as failure:
            self._error = DropError(f"a plane could not be read ({failure}); load the model again.")
        finally:
            with self._changed:
                self.done = True
                self._changed.notify_all()


def start(store: PlaneStore) -> Upgrade:
    """The upgrade of a store; a finished one is started again, a running one is shared."""
    with _starting:
        if store.upgrade is None or store.upgrade.done:
            store.upgrade = Upgrade(store)
        upgrade: Upgrade = store.upgrade
        return upgrade


def is_pulling(folder: Path) -> bool:
    """Whether a `pull` works on a folder; its module is loaded when it is first asked."""
    from dropbydrop.checkpoint import pull  # brings the progress bars

    return pull.is_pulling(folder)


def wait_for_planes(checkpoint: Checkpoint, bits: int, stop: threading.Event | None = None) -> None:
    """Return when the planes of level `bits` are present, or `stop` is set.

    Raises:
        MissingPlaneError: a plane is absent and no pull is running.
    """
    needed = set(range(1, checkpoint.quantization.prefix_of(bits) + 1))
    while not (stop and stop.is_set()):
        pulling = is_pulling(checkpoint.path)  # asked first: a pull may end between the two looks
        if needed <= set(checkpoint.planes_present()):
            return
        if not pulling:
            checkpoint.require(bits)  # names the file
            return
        time.sleep(_POLL)


def open_when_ready(path: Path | str, bits: int | None, verify: bool = True) -> Checkpoint:
    """Open a folder that a pull may still be filling, as soon as `bits` can be loaded from it.

    Raises:
        FormatError, MissingPlaneError, PrecisionError: as `Checkpoint.open` and `require`, once no
            pull is running (any more).
    """
    folder = given(path)
    while is_pulling(folder) and not all(
        (folder / name).is_file() for name in (MANIFEST_FILE, CONFIG_FILE, REST_FILE)
    ):
        time.sleep(_POLL)
    checkpoint = Checkpoint.open(folder, verify)
    level = checkpoint.quantization.bits if bits is None else bits
    wait_for_planes(checkpoint, checkpoint.quantization.check_level(level))
    return checkpoint
