"""Servers one after the other: how soon they answer, what they hold, how fast 1 and 8 requests are.

    python benchmarks/servers.py --tokens 32 --json out.json \
        'bf16=vllm serve MODEL --dtype bfloat16' 'dropbydrop=dropbydrop serve OUT'

Each command gets `--port`. Memory is the proportional share of all of its processes. Beside seconds
there are seconds of processor time of these processes, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

SECONDS = 900  # until a server answers
PROMPT = "The sea is"


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started."""
    return [process, *process.children(recursive=True)]


def processor_time(process: psutil.Process) -> float:
    """Seconds of all cores that a family has used, also in children that have ended."""
    total = 0.0
    for one in family(process):
        times = one.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def ask(address: str, body: dict[str, Any]) -> int:
    """Number of tokens that a completion had."""
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


def measure(command: str, tokens: int, log: Path) -> dict[str, float]:
    """Start, measure and stop one server."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    address, begun = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*shlex.split(command), "--port", str(port)], stdout=out, stderr=subprocess.STDOUT
        )
    process = psutil.Process(server.pid)
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > begun + SECONDS:
                    raise SystemExit(f"{command} does not answer; see {log}") from None
                time.sleep(0.2)
        found = {"start_s": time.monotonic() - begun, "start_cpu_s": processor_time(process)}
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
            model = json.load(answer)["data"][0]["id"]
        body = {
            "model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        ask(address, body)  # what a first request compiles is not counted
        for n in (1, 8):
            best = best_cpu = float("inf")
            for _ in range(3):
                start, cpu = time.monotonic(), processor_time(process)
                with ThreadPoolExecutor(n) as pool:
                    given = sum(pool.map(lambda _: ask(address, body), range(n)))
                best = min(best, (time.monotonic() - start) / given)
                best_cpu = min(best_cpu, (processor_time(process) - cpu) / given)
            found |= {f"tokens_per_s_{n}": 1 / best, f"cpu_ms_per_token_{n}": 1000 * best_cpu}
        memory = [one.memory_full_info().pss for one in family(process)]
        return {**found, "memory_mb": sum(memory) / 1e6, "largest_process_mb": max(memory) / 1e6}
    finally:
        started = family(process) if server.poll() is None else []
        for one in reversed(started):
            one.terminate()
        for one in psutil.wait_procs(started, 30)[1]:
            one.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("servers", nargs="+", help="NAME=COMMAND")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    results = {}
    for server in given.servers:
        name, _, command = server.partition("=")
        results[name] = measure(command, given.tokens, given.json.with_suffix(f".{name}.log"))
        print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
