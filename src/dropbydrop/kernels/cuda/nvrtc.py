"""CUDA C compiled and launched at run time: NVRTC comes with torch, the driver with the GPU.

    function = Function(source, "product", {"P": 2}, device=0)     # compiled for this device
    function.launch(grid=(132, 1), threads=512, shared=65536, arguments=[...])

torch.cuda._compile_kernel does much the same; it looks for the headers of an installed toolkit and
fails without one, and this package must not need a compiler. Pointers are passed as c_void_p,
integers as c_int, structures as they are. Launches go to torch's current stream, so that CUDA
graphs record them; compile before a capture (the first call does).

A launch with `overlap` may start while the kernel before it on the stream still runs (programmatic
dependent launch, compute capability 9.0): it must wait before it reads what that one wrote.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dropbydrop.system.errors import KernelError

_OPTIN_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_FREE_SHARED = 48 << 10  # what a kernel may use without opting in
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def source(*names: str) -> str:
    """CUDA sources of this folder, one after the other, after what all of them use."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text() for name in ("numbers.cu", *names))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor as an argument of a kernel; None is a null pointer."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _candidates() -> list[str]:
    """Names and paths under which NVRTC may be found, best first."""
    version = (torch.version.cuda or "12").split(".")[0]
    if sys.platform == "win32":
        return [f"nvrtc64_{version}0_0.dll"]
    spec = find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(
        str(path) for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")
    )
    same = [path for path in found if path.endswith(f".so.{version}")]
    return [f"libnvrtc.so.{version}", *same, *found, "libnvrtc.so"]


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL | None:
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def missing() -> str:
    """Why nothing can be compiled here, or an empty string."""
    return "" if _nvrtc() else "the NVRTC library, which torch for CUDA brings, was not found"


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _checked(status: int, what: str) -> None:
    if status:
        raise KernelError(
            f"{what} failed with CUDA status {status}. Choose another kernel by name "
            "(DROPBYDROP_KERNEL=triton), and please report the model and the GPU."
        )


def compile_source(source: str, name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """A cubin ("sm_90") or PTX ("compute_90") of CUDA C.

    Raises:
        KernelError: no NVRTC here, or the source does not compile; with the compiler's log.
    """
    library = _nvrtc()
    if library is None:
        raise KernelError(f"CUDA kernels cannot be compiled: {missing()}.")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device"]
    options += [f"-D{key}={value}" for key, value in defines.items()]
    encoded = [option.encode() for option in options]
    program = ctypes.c_void_p()
    _checked(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None
        ),
        "creating a CUDA program",
    )
    try:
        array = (ctypes.c_char_p * len(encoded))(*encoded)
        if library.nvrtcCompileProgram(program, len(encoded), array):
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise KernelError(
                f"{name}.cu does not compile for {architecture}: {log.decode(errors='replace')}"
            )
        kind = "PTX" if architecture.startswith("compute") else "CUBIN"
        return _text(
            getattr(library, f"nvrtcGet{kind}Size"), getattr(library, f"nvrtcGet{kind}"), program
        )
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    count = ctypes.c_size_t()
    _checked(size(program, ctypes.byref(count)), "reading what NVRTC produced")
    buffer = ctypes.create_string_buffer(count.value)
    _checked(get(program, buffer), "reading what NVRTC produced")
    return buffer.raw


class Function:
    """A kernel of a source, compiled with `defines` for one device and loaded there."""

    def __init__(self, source: str, name: str, defines: Mapping[str, int], device: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        image = compile_source(source, name, defines, f"sm_{major}{minor}")
        self._device, self._shared = device, _FREE_SHARED
        self._overlaps = (major, minor) >= (9, 0)
        self._resident: dict[tuple[int, int], int] = {}
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context the current one
            driver = _driver()
            _checked(driver.cuModuleLoadData(ctypes.byref(self._module), image), f"loading {name}")
            _checked(
                driver.cuModuleGetFunction(
                    ctypes.byref(self._function), self._module, name.encode()
                ),
                f"finding {name}",
            )

    def resident(self, threads: int, shared: int) -> int:
        """Blocks of `threads` with `shared` bytes that a multiprocessor holds; at least one."""
        key = threads, shared
        if key not in self._resident:
            count = ctypes.c_int()
            with torch.cuda.device(self._device):
                self._allow(shared)
                _checked(
                    _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                        ctypes.byref(count), self._function, threads, ctypes.c_size_t(shared)
                    ),
                    "asking for the occupancy of a kernel",
                )
            self._resident[key] = max(1, count.value)
        return self._resident[key]

    def _allow(self, shared: int) -> None:
        """Opt in to more shared memory than every kernel may use, and ask for all that there is, so
        that several blocks fit: the kernels here need little first-level cache."""
        if shared > self._shared:
            _driver().cuFuncSetAttribute(self._function, _CARVEOUT, 100)  # a preference
            _checked(
                _driver().cuFuncSetAttribute(self._function, _OPTIN_SHARED, shared),
                f"asking for {shared} bytes of shared memory",
            )
            self._shared = shared

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Sequence[Any],
        overlap: bool = False,
    ) -> None:
        """Run on the current stream of the function's device; `arguments` are ctypes values."""
        driver = _driver()
        with torch.cuda.device(self._device):
            self._allow(shared)
            pointers = (ctypes.c_void_p * len(arguments))(
                *[ctypes.addressof(argument) for argument in arguments]
            )
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            if overlap and self._overlaps:
                attribute = _Attribute(_SERIALIZATION, 0, (1,))
                config = _Config(
                    (*grid, 1), (threads, 1, 1), shared, stream, ctypes.pointer(attribute), 1
                )
                if not driver.cuLaunchKernelEx(
                    ctypes.byref(config), self._function, pointers, None
                ):
                    return
                self._overlaps = False  # an older driver: launch as usual from now on
            _checked(
                driver.cuLaunchKernel(
                    self._function, *grid, 1, threads, 1, 1, shared, stream, pointers, None
                ),
                "launching a kernel",
            )
