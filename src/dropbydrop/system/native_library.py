"""The native library `libdropbydrop`: the search of codes, and the kernels of CPU inference.

A plain C interface (native/*/c_api.h) keeps one wheel valid for every Python and torch. Pointers
are passed as integers (`Tensor.data_ptr()`); a call costs about a microsecond and releases the
interpreter lock. An absent library is no error: `library()` is then None and everything runs
through torch.

In a wheel the library lies beside the sources, in `_native/`. An editable install keeps the sources
in the checkout and puts what it built into site-packages; the package's `__path__` then has both
folders. It is looked up under the package's literal name, whatever folder this module is in.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import lru_cache
from pathlib import Path

log = logging.getLogger("dropbydrop.native")

VERSION = 5  # drop_version() that this module was written for
_FILE = "libdropbydrop." + {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")

_int, _i64, _ptr, _str = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    # native/common/c_api.h
    "drop_version": (_int, []),
    "drop_thread_pool": (_str, []),
    # native/search/c_api.h
    "drop_search_backend": (_str, [_int]),
    "drop_search": (_int, [_str, _ptr, _int]),
    # native/trellis/c_api.h
    "drop_trellis_backend": (_str, [_int]),
    "drop_trellis_search": (_int, [_str, _ptr, _int]),
    # native/kernels/c_api.h
    "drop_kernel_count": (_int, []),
    "drop_kernel_name": (_str, [_int]),
    "drop_kernel_summary": (_str, [_int]),
    "drop_kernel_supported": (_int, [_int]),
    "drop_packed_bytes": (_i64, [_i64, _i64]),
    "drop_pack": (None, [_ptr, _i64, _i64, _ptr]),
    "drop_unpack": (None, [_ptr, _i64, _i64, _ptr]),
    "drop_codebook_bytes": (_i64, [_i64]),
    "drop_prepare_codebook": (None, [_ptr, _i64, _ptr]),
    "drop_trellis_bytes": (_i64, []),
    "drop_prepare_trellis": (_int, [_int, _int, _ptr, _ptr, ctypes.c_float, _ptr]),
    "drop_lut_bytes": (_i64, [_int, _i64, _i64, _i64]),
    "drop_rotate": (_int, [_int, _ptr, _int, _i64, _i64, _i64, _i64, _ptr, _ptr, _ptr, _int]),
    "drop_build_lut": (_int, [_int, _ptr, _i64, _i64, _i64, _ptr, _ptr, _int]),
    "drop_lut_gemv": (
        _int,
        [_int, _ptr, _i64, _i64, _i64, _i64, _ptr, _i64, _ptr, _int, _int],
    ),
    "drop_input_group": (_int, [_int, _ptr, _ptr, _int, _i64, _i64, _ptr, _int, _int]),
    "drop_decode": (
        _int,
        [_int, _ptr, _int, _i64, _i64, _i64, _ptr, _ptr, _int, _i64, _i64, _ptr, _int, _int],
    ),
    "drop_trellis_decode": (
        _int,
        [_int, _ptr, _i64, _i64, _i64, _ptr, _ptr, _int, _i64, _i64, _ptr, _int, _int],
    ),
    "drop_int8_rows": (
        _int,
        [_int, _ptr, _i64, _i64, _ptr, _int, _ptr, _int, _i64, _ptr, _int, _int],
    ),
    "drop_step": (_int, [_int, _ptr, _ptr, _int]),
    "drop_stream_read": (ctypes.c_uint64, [_int, _ptr, _i64, _int]),
}


def members(kind: type, *names: str) -> tuple[tuple[str, type], ...]:
    """Members of one kind, for the `_fields_` of a structure of native/*/c_api.h."""
    return tuple((name, kind) for name in names)


def library_path() -> Path:
    """The file of the library: the first that is there, else where it was expected."""
    folders = [Path(folder) for folder in sys.modules["dropbydrop"].__path__]
    paths = [folder / "_native" / _FILE for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def built_libraries() -> list[Path]:
    """The compiled files that are there: what results may depend on beside the sources."""
    return [path for path in [library_path()] if path.is_file()]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None when it was not built or does not fit this version."""
    path = library_path()
    if not path.is_file():
        log.info("no native library at %s: running on torch", path)
        return None
    try:
        lib = ctypes.CDLL(str(path))
        found = lib.drop_version()
        if found == VERSION:
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(lib, name)
                function.restype, function.argtypes = result, arguments
            return lib
    except (OSError, AttributeError) as error:
        log.warning("the native library cannot be loaded (%s): running on torch", error)
        return None
    log.warning(
        "the native library has interface %d, this version needs %d: running on torch. "
        "Reinstall dropbydrop to rebuild it.",
        found,
        VERSION,
    )
    return None
