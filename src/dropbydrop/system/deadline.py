"""A time limit for Python code of others that may never end.

A timer raises an exception in the thread that runs it, at its next bytecode. So code that stays in
one call of C (a product of two huge numbers, a lock) is not stopped before that call returns.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Stopped(BaseException):
    """Not an Exception: code that catches whatever happens must not catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stops the block, in this thread alone, after so many seconds.

    Raises:
        TimeoutError: it was stopped.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    lock, ended, fired = threading.Lock(), False, False

    def stop() -> None:
        nonlocal fired
        with lock:
            if not ended:
                fired = True
                raise_in(thread, ctypes.py_object(_Stopped))

    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    try:
        try:
            timer.start()  # may fire before this returns
            yield
        finally:
            with lock:
                ended = True
            timer.cancel()
            if fired:  # and not yet delivered
                raise_in(thread, None)
    except _Stopped:
        raise TimeoutError(f"it was stopped after {seconds:g} seconds") from None
