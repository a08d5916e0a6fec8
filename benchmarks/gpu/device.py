"""The steps of benchmarks/gpu.py that run other programs: tests, counters."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .timing import REAL, Bench, Unavailable, Way

ROOT = Path(__file__).parents[2]
TESTS_SECONDS = 170  # then what ran until there counts
COUNTERS_SECONDS = 40
COUNTERS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "smsp__inst_executed.sum",
    "sm__inst_executed_pipe_alu.sum",
    "sm__inst_executed_pipe_lsu.sum",
    "l1tex__lsuin_requests.sum",  # memory instructions that enter the shared pipeline,
    "l1tex__lsuin_requests.avg.pct_of_peak_sustained_elapsed",  # of as many as it takes
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",  # turns of shared memory
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "lts__t_sectors.sum",
    "dram__bytes_read.sum",
)


def limited(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """(exit status, None if its time was up; what it printed)."""
    paths = [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return None, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout + done.stderr


def outcome(said: str) -> dict[str, Any]:
    """What `pytest -v` printed: numbers of passed and failed tests, names of the failed ones."""
    found = re.findall(r"(\S+::\S+).*?\b(PASSED|FAILED|ERROR)\b", said)
    found += [(name, how) for how, name in re.findall(r"\b(PASSED|FAILED|ERROR) (\S+::\S+)", said)]
    how = dict(found)  # of every test once: the summary repeats those that failed
    failed = sorted(name for name, result in how.items() if result != "PASSED")
    return {"passed": len(how) - len(failed), "failed": failed}


def tests(b: Bench) -> dict[str, Any]:
    """The tests marked `gpu`, those of kernels and search before whole models."""
    if not b.cuda:
        raise Unavailable("the tests marked gpu need a CUDA device")
    if not (ROOT / "tests").is_dir():
        raise Unavailable(f"no folder {ROOT / 'tests'}")
    folders = [f"tests/{name}" for name in ("kernels", "coding", "runtime")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    status, said = limited([*command, *folders], TESTS_SECONDS)
    if status is None:
        return outcome(said) | {"given_up_after_s": TESTS_SECONDS}
    if status not in (0, 1):
        raise RuntimeError(f"pytest ended with {status}: {said[-500:]}")
    return outcome(said)


def table(said: str) -> list[dict[str, str]]:
    """What `ncu --csv` printed: for each launch its kernel and the value of every counter."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        entry = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        entry[row["Metric Name"]] = row["Metric Value"]
    return list(launches.values())


def counters(b: Bench) -> dict[str, Any]:
    """Hardware counters of one product of each kind of planes, where NVIDIA's `ncu` is on the PATH:
    rows are in the order of `ways`, an extra launch of each before."""
    tool = shutil.which("ncu")
    if tool is None:
        raise Unavailable("no ncu on the PATH")
    ways = [[way.code, way.kernel, bits] for way in b.ways for bits in (2, 4)]
    begin = time.perf_counter()
    code = f"from gpu.device import launches; launches({ways!r}, {b.sizes.matvec[0]!r})"
    command = [tool, "--csv", "--kernel-name", "product", "--metrics", ",".join(COUNTERS)]
    status, said = limited([*command, sys.executable, "-c", code], COUNTERS_SECONDS)
    seconds = time.perf_counter() - begin
    if status is None:
        raise RuntimeError(f"ncu was not done after {seconds:.0f} seconds")
    if status or not (rows := table(said)):
        raise RuntimeError(f"ncu ended with {status}: {said[-500:]}")
    return {"ways": ways, "launches": rows}


def launches(ways: Sequence[Sequence[Any]], shape: tuple[int, int]) -> None:
    """Two products a way on the device, for `counters`: the first finds its kernel cold."""
    b = Bench("cuda", REAL, 256)
    for code, kernel, bits in ways:
        x = torch.randn(1, shape[1], dtype=torch.bfloat16, device=b.device)
        product = b.products([shape[0]], shape[1], bits, Way(code, kernel))
        for _ in range(2):
            product(x)
    torch.cuda.synchronize()
