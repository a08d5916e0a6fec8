"""Drop-by-Drop: quantize an LLM once, run it at any precision.

    import dropbydrop
    model = dropbydrop.load("out", bits=3)      # reads planes 1..3 only
    two = dropbydrop.view(model, bits=2)        # an immutable view on the same storage

Importing the package also teaches transformers to read these folders (`from_pretrained`).
"""

from .planning.plan import Plan
from .planning.solver import make_plan
from .runtime.hf import register
from .runtime.load import load, upgrade
from .runtime.views import load_planes, plan_of, precision, view
from .system.version import __version__

register()

__all__ = [
    "Plan",
    "__version__",
    "load",
    "load_planes",
    "make_plan",
    "plan_of",
    "precision",
    "upgrade",
    "view",
]
