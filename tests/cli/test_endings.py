"""How a command ends when it is told to stop, or when the operating system refuses."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from dropbydrop.checkpoint import slice as module
from dropbydrop.cli import main as cli

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Ending = Callable[[Callable[[], object]], int]


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ending]:
    """ending(work) -> the exit status of a command that does `work`."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make jobs ignore it
    monkeypatch.setattr(sys, "argv", ["dropbydrop", "slice", str(tmp_path), "x", "--bits", "2"])

    def run(work: Callable[[], object]) -> int:
        monkeypatch.setattr(module, "slice_checkpoint", lambda *args, **kwargs: work())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_signals_clean_up(
    ending: Ending, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(number)

    assert ending(work) == 130
    assert cleaned == [number]
    assert "nothing was left half-written" in capsys.readouterr().err


def test_streams_take_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locale without UTF-8, bytes that are no text, streams that whoever calls has closed."""
    raw = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"\xff\n"), "utf-8"))
    monkeypatch.setattr(sys, "stderr", None)
    cli._open_streams()
    print("ä", file=sys.stderr)
    sys.stdout.write("ä")
    sys.stdout.flush()
    assert raw.getvalue() == rb"\xe4"
    assert sys.stdin.readline() == "\ufffd\n"


def test_an_interrupt_before_a_command_has_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(**options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", late)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_nohup_is_respected(ending: Ending) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work() -> None:
        signal.raise_signal(signal.SIGHUP)
        raise PermissionError(errno.EACCES, "no", "here")

    assert ending(work) == 2
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ENOSPC])
def test_what_the_system_refuses_is_one_line(
    ending: Ending, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def work() -> None:
        raise OSError(number, os.strerror(number), "/place/file")

    assert ending(work) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert os.strerror(number) in told
    assert told.count("\n") == 1


def test_an_os_error_of_no_operating_system_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("a library's own")

    monkeypatch.setattr(module, "slice_checkpoint", broken)
    monkeypatch.setattr(sys, "argv", ["dropbydrop", "slice", str(tmp_path), "x", "--bits", "2"])
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        with pytest.raises(OSError, match="own"):
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
