"""CUDA sources of the package as libraries for the host, over cuda_on_cpu.h."""

import ctypes
import shutil
import subprocess
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
