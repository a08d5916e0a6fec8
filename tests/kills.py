"""Has this process killed in the middle of its work, as a power cut or `kill -9` would do it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

# Processes of their own, forked from one that has all that is slow to import. (Names of tests would
# not do: a server of Python 3.11 looks for them without this process's path, and says nothing.)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "transformers",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.generation",
        "dropbydrop.quantization.pipeline",
        "dropbydrop.tuning.pipeline",
        "dropbydrop.runtime.load",
        "pytest",
        "hypothesis",
    ]
)
OPERATIONS = ("fsync", "rename", "mkdir", "unlink", "rmdir")  # of os


def die_at(count: int, *calls: tuple[Any, str]) -> None:
    """Kill this process right before the `count`-th of these calls, counted together.

    Args:
        calls: (module or class, name of a function in it).
    """
    left = [count]

    def wrap(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, name, counted)

    for module, name in calls:
        wrap(module, name)


def die_at_operation(count: int) -> None:
    """Kill this process right before its `count`-th file operation."""
    die_at(count, *((os, name) for name in OPERATIONS))
