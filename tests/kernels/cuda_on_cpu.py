"""CUDA sources of the package as libraries for the host, over cuda_on_cpu.h."""

import ctypes
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from dropbydrop.kernels.cuda import int8

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")


def compiled(folder: Path, glue: str, name: str, defines: dict[str, int]) -> ctypes.CDLL:
    """A CUDA source as a library for the host."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    out = folder / f"{name}.so"
    (folder / f"{name}.cpp").write_text(glue)
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
        + [f"-I{HERE}", f"-I{Path(int8.__file__).parent}", "-w"]
        + [f"-D{key}={value}" for key, value in defines.items()]
        + [str(folder / f"{name}.cpp"), "-o", str(out)],
        check=True,
    )
    return ctypes.CDLL(str(out))


def check_resources(image: bytes, functions: set[str]) -> None:
    """Nothing in local memory but a pointer or two: no array that is indexed at run time."""
    spec = find_spec("triton")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    if tool is None or not tool.is_file() or not image.startswith(b"\x7fELF"):
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True,
                              check=True)  # fmt: skip
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", done.stdout)
    assert {name for name, *_ in used} == functions
    assert all(int(stack) <= 16 for *_, stack in used)
