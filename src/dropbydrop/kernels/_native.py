"""The native library of CPU kernels, loaded with ctypes.

A plain C interface (native/kernels/drop_kernels.h) keeps one wheel valid for every Python and
torch. Pointers are passed as integers (`Tensor.data_ptr()`); a call costs about a microsecond and
releases the interpreter lock. An absent library is no error: `library()` is then None and
everything runs through torch.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from dropbydrop.system.native_library import library_path

log = logging.getLogger("dropbydrop.kernels")

INTERFACE = 1  # drop_kernels_version() this module was written for
PATH = library_path("drop_kernels")

_int, _i64, _ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "drop_kernels_version": (_int, []),
    "drop_kernel_count": (_int, []),
    "drop_kernel_name": (ctypes.c_char_p, [_int]),
    "drop_kernel_summary": (ctypes.c_char_p, [_int]),
    "drop_kernel_supported": (_int, [_int]),
    "drop_team_kind": (ctypes.c_char_p, []),
    "drop_packed_bytes": (_i64, [_i64, _i64]),
    "drop_pack": (None, [_ptr, _i64, _i64, _ptr]),
    "drop_unpack": (None, [_ptr, _i64, _i64, _ptr]),
    "drop_codebook_bytes": (_i64, [_i64]),
    "drop_prepare_codebook": (None, [_ptr, _i64, _ptr]),
    "drop_table_bytes": (_i64, [_int, _i64, _i64, _i64]),
    "drop_rotate": (_int, [_int, _ptr, _int, _i64, _i64, _i64, _i64, _ptr, _ptr, _ptr, _int]),
    "drop_build": (_int, [_int, _ptr, _i64, _i64, _i64, _ptr, _ptr, _int]),
    "drop_multiply": (
        _int,
        [_int, _ptr, _i64, _i64, _i64, _i64, _ptr, _i64, _ptr, _int, _int],
    ),
    "drop_site": (_int, [_int, _ptr, _ptr, _int, _i64, _i64, _ptr, _int, _int]),
    "drop_decode": (
        _int,
        [_int, _ptr, _int, _i64, _i64, _i64, _ptr, _ptr, _int, _i64, _i64, _ptr, _int, _int],
    ),
    "drop_rows": (
        _int,
        [_int, _ptr, _i64, _i64, _ptr, _int, _ptr, _int, _i64, _ptr, _int, _int],
    ),
    "drop_step": (_int, [_int, _ptr, _ptr, _int]),
    "drop_stream_read": (ctypes.c_uint64, [_int, _ptr, _i64, _int]),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None when it was not built or does not fit this version."""
    if not PATH.is_file():
        log.info("no native kernels at %s: running on torch", PATH)
        return None
    try:
        lib = ctypes.CDLL(str(PATH))
        lib.drop_kernels_version.restype = _int
        found = lib.drop_kernels_version()
    except (OSError, AttributeError) as error:
        log.warning("native kernels cannot be loaded (%s): running on torch", error)
        return None
    if found != INTERFACE:
        log.warning(
            "native kernels have interface %d, this version needs %d: running on torch. "
            "Reinstall dropbydrop to rebuild them.",
            found,
            INTERFACE,
        )
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """A C array of the tensors' addresses. The tensors must outlive its use."""
    return (_ptr * len(tensors))(*[t.data_ptr() for t in tensors])
