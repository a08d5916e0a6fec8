"""`dropbydrop serve` as a process: the line when it is ready, and a clean end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from dropbydrop.cli.main import app
from dropbydrop.system.errors import DropError


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ready_and_ended(chat_folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "dropbydrop", "serve", str(chat_folder), "--port", "0"]
    started = subprocess.Popen(
        [*command, "--bits", "2,3", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert started.stdout is not None
        ready = json.loads(started.stdout.readline())
        assert [level["bits"] for level in ready["levels"]] == [2, 3]
        body = {"prompt": "the", "max_tokens": 250, "stream": True, "ignore_eos": True, "n": 8}
        url = ready["address"] + "/v1/completions"
        with httpx2.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)  # a stream is open while it is asked to end
            started.send_signal(number)
            assert "data: [DONE]" in lines  # and ends as streams do
        output, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 0, errors.decode()
    assert output == b""
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    "options",
    [
        ["--queue", "0"],
        ["--target-tps", "-1"],
        ["--target-tps", "nan"],
        ["--target-tps", "inf"],
        ["--port", "70000"],
        ["--host", "a" * 80],
        ["--api-key", " "],
        ["--device", "tpu"],
    ],
)
def test_options_that_are_refused(chat_folder: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, ["serve", str(chat_folder), *options])
    assert isinstance(result.exception, DropError)
    assert options[0] in str(result.exception)
