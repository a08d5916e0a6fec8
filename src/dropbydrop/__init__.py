"""Drop-by-Drop: quantize an LLM once, run it at any precision.

    import dropbydrop
    dropbydrop.quantize("smollm2", "out", bits=(2, 3, 4))
    model = dropbydrop.load("out", bits=3)      # reads planes 1..3 only
    two = dropbydrop.view(model, bits=2)        # an immutable view on the same storage

Importing the package imports nothing else: a name is looked up when it is used, and only then come
torch and transformers. Nothing of the process changes either: `register` teaches transformers to
read these folders (`from_pretrained`), and `load` does so by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planning.plan import Plan
    from .planning.solver import make_plan
    from .quantization.config import QuantizeConfig
    from .quantization.pipeline import quantize
    from .runtime.hf import register
    from .runtime.load import load, upgrade
    from .runtime.views import load_planes, plan_of, precision, view
    from .system.version import __version__

_HOMES = {
    "Plan": "planning.plan",
    "QuantizeConfig": "quantization.config",
    "__version__": "system.version",
    "load": "runtime.load",
    "load_planes": "runtime.views",
    "make_plan": "planning.solver",
    "plan_of": "runtime.views",
    "precision": "runtime.views",
    "quantize": "quantization.pipeline",
    "register": "runtime.hf",
    "upgrade": "runtime.load",
    "view": "runtime.views",
}

__all__ = [
    "Plan",
    "QuantizeConfig",
    "__version__",
    "load",
    "load_planes",
    "make_plan",
    "plan_of",
    "precision",
    "quantize",
    "register",
    "upgrade",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
