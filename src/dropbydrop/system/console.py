"""What a run shows on stderr: progress of one look, and nothing of other libraries.

stdout stays free for results. Progress is a bar on a terminal. Elsewhere (a log, a pipe, CI) it is
plain lines: one when a task begins, one every 30 seconds even where a single step takes longer, and
one when it ends:

    quantize 12/30, 40 %, 0:02:10, ETA 0:03:15
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 30.0  # seconds from one plain line to the next
_TURNS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # of text
_SPEED_PERIOD = 600.0  # steps may take minutes; rich's own 30 seconds would give them no ETA


def progress_bar(enabled: bool = True) -> Progress:
    """The progress of tasks, to use as a context manager: a bar, or lines without a terminal."""
    console = Console(file=sys.stderr)  # of now: some work redirects stderr while it runs
    if enabled and not (console.is_interactive or console.is_jupyter):
        return ProgressLines(sys.stderr)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=_SPEED_PERIOD,
        disable=not enabled,
    )


def printable(text: str) -> str:
    """Text from a model, a checkpoint or a file name for a terminal: control characters, which
    could move the cursor, rename the window or hide what was written, are shown as escapes."""
    return "".join(
        c
        if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _TURNS)
        else c.encode("unicode_escape").decode()
        for c in text
    )


class SafeConsole(Console):
    """rich's Console that shows control characters of what it is given (`printable`)."""

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(printable(x) if isinstance(x, str) else x for x in objects), **settings)


@contextmanager
def phase(description: str, enabled: bool = True) -> Iterator[None]:
    """Progress of work that cannot be counted: what it is, and for how long it runs."""
    with progress_bar(enabled) as bar:
        task = bar.add_task(description, total=None)
        yield
        bar.update(task, total=1, completed=1)


class ProgressLines(Progress):
    """rich's Progress for a log: lines in `file`, a running task's every `every` seconds."""

    def __init__(
        self, file: TextIO, get_time: Callable[[], float] = time.monotonic, every: float = EVERY
    ) -> None:
        super().__init__(auto_refresh=False, get_time=get_time, disable=True)
        self._file, self._every = file, every
        self._already: dict[TaskID, float] = {}  # completed when a task began, as after --resume
        self._ended: set[TaskID] = set()
        self._stopped = threading.Event()
        self._timer = threading.Thread(target=self._repeat, daemon=True)

    def start(self) -> None:
        self._timer.start()

    def stop(self) -> None:
        self._stopped.set()
        self._timer.join()
        self.write_lines()  # how far tasks came that were interrupted

    def add_task(self, description: str, *args: Any, **settings: Any) -> TaskID:
        with self._lock:
            number = super().add_task(description, *args, **settings)
            self._already[number] = self._tasks[number].completed
            self._write(self._tasks[number])
        return number

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.write_lines(running=False)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self.write_lines(running=False)

    def write_lines(self, running: bool = True) -> None:
        """Write the last line of tasks that have just ended, and one of those still running."""
        with self._lock:
            for task in self.tasks:
                if task.id not in self._ended and (running or _finished(task)):
                    self._write(task)

    def _repeat(self) -> None:
        while not self._stopped.wait(self._every):
            self.write_lines()

    def _write(self, task: Task) -> None:
        if _finished(task):
            self._ended.add(task.id)
        with suppress(OSError, ValueError):  # a log that was closed must not end a run of hours
            self._file.write(self._line(task) + "\n")
            self._file.flush()

    def _line(self, task: Task) -> str:
        elapsed, done = task.elapsed or 0.0, task.completed - self._already[task.id]
        if task.total is None:
            return f"{task.description} ..., {_clock(elapsed)}"
        line = f"{task.description} {task.completed:.0f}/{task.total:.0f}, {task.percentage:.0f} %"
        line += f", {_clock(elapsed)}"
        if _finished(task) or done <= 0:
            return line
        return f"{line}, ETA {_clock(elapsed * (task.total - task.completed) / done)}"


def _finished(task: Task) -> bool:
    return task.total is not None and task.completed >= task.total


def _clock(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers and huggingface_hub print only errors inside, and no progress bars of theirs.

    The previous settings come back afterwards. transformers is imported on entry, not before.
    """
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
