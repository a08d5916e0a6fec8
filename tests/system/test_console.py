"""Progress on a terminal, in a log and through a pipe."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time

import pytest

from dropbydrop.system import console
from dropbydrop.system.console import ProgressLines, phase, progress_bar


class Clock:
    """A clock that stands still between the moments a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines_of(file: io.StringIO) -> list[str]:
    return file.getvalue().splitlines()


def test_lines_say_how_far_how_long_and_how_much_longer(clock: Clock) -> None:
    file = io.StringIO()
    bar = ProgressLines(file, clock)
    task = bar.add_task("quantize", total=30)
    clock.now = 130.0
    bar.advance(task, 12)
    bar.write_lines()
    clock.now = 3725.0
    bar.advance(task, 18)
    bar.write_lines()  # nothing more to say
    assert lines_of(file) == [
        "quantize 0/30, 0 %, 0:00:00",
        "quantize 12/30, 40 %, 0:02:10, ETA 0:03:15",
        "quantize 30/30, 100 %, 1:02:05",
    ]


def test_the_time_left_after_a_resume_counts_only_new_steps(clock: Clock) -> None:
    file = io.StringIO()
    bar = ProgressLines(file, clock)
    task = bar.add_task("quantize", total=30, completed=20)
    clock.now = 100.0
    bar.advance(task, 5)
    bar.write_lines()
    assert lines_of(file)[-1] == "quantize 25/30, 83 %, 0:01:40, ETA 0:01:40"
    bar.add_task("tune", total=4, completed=4)
    bar.write_lines()
    assert [line for line in lines_of(file) if "tune" in line] == ["tune 4/4, 100 %, 0:00:00"]


def test_an_interrupted_task_says_how_far_it_came(clock: Clock) -> None:
    file = io.StringIO()

    def work() -> None:
        with ProgressLines(file, clock) as bar:
            task = bar.add_task("evaluate", total=8)
            bar.update(task, advance=2, description="evaluate level 3")
            clock.now = 10.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert lines_of(file)[-1] == "evaluate level 3 2/8, 25 %, 0:00:10, ETA 0:00:30"


def test_a_step_longer_than_the_interval_still_shows_lines() -> None:
    file = io.StringIO()
    with ProgressLines(file, every=0.01) as bar:
        bar.add_task("quantize", total=2)
        deadline = time.monotonic() + 30
        while len(lines_of(file)) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert len(lines_of(file)) >= 4
    assert not bar._timer.is_alive()


def test_between_lines_stand_thirty_seconds() -> None:
    assert console.EVERY == 30.0
    file = io.StringIO()
    with ProgressLines(file) as bar:
        task = bar.add_task("fast", total=1000)
        for _ in range(1000):
            bar.advance(task)
    assert len(lines_of(file)) == 2  # its beginning and its end


def test_iterating_and_work_without_a_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    assert list(ProgressLines(file, clock).track([1, 2], description="statistics")) == [1, 2]
    assert lines_of(file) == ["statistics 0/2, 0 %, 0:00:00", "statistics 2/2, 100 %, 0:00:00"]
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    with phase("writing"):
        sys.stderr = io.StringIO()  # as around libraries that draw bars of their own
    assert lines_of(file) == ["writing ..., 0:00:00", "writing 1/1, 100 %, 0:00:00"]
    with phase("writing", enabled=False):
        pass
    assert sys.stderr.getvalue() == ""


def test_a_log_that_closes_does_not_end_the_work() -> None:
    read, write = os.pipe()
    os.close(read)
    bar = ProgressLines(os.fdopen(write, "w"))
    bar.advance(bar.add_task("quantize", total=1))
    closed = io.StringIO()
    closed.close()
    ProgressLines(closed).add_task("quantize", total=1)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_bar_on_a_terminal_and_lines_through_a_pipe() -> None:
    program = (
        "from dropbydrop.system.console import progress_bar\n"
        "with progress_bar() as bar:\n"
        "    bar.advance(bar.add_task('quantize', total=1))\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    command, env = [sys.executable, "-c", program], env | {"TERM": "xterm"}
    piped = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert piped.stdout == ""
    assert piped.stderr == "quantize 0/1, 0 %, 0:00:00\nquantize 1/1, 100 %, 0:00:00\n"
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the terminal's other side is closed: the end
            pass
    os.close(ours)
    assert process.returncode == 0
    assert re.search(r"quantize.*━.*1/1", shown.decode())
    assert not progress_bar(enabled=False).tasks
