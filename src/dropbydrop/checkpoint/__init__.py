"""The nested checkpoint on disk: `format` (what is written), `writer`, `reader`.

The specification is docs/format.md; `format.py` is its executable form.
"""

from .config import Embeddings, PlaneSpec, QuantizationConfig, StoredGroup
from .files import Manifest
from .reader import Checkpoint, Finding
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Embeddings",
    "Finding",
    "Manifest",
    "PlaneSpec",
    "QuantizationConfig",
    "StoredGroup",
]
