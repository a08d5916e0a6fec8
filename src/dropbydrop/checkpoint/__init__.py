"""The nested checkpoint on disk; docs/format.md is its specification.

config.py, embeddings.py, fields.py   quantization_config, parsed strictly
tables.py                       embedding and head in planes
files.py, tensor_files.py       the manifest; safetensors files
writer.py, staging.py           one folder, all of it or nothing
reader.py, contents.py          what is there, what may be there, its tensors
checked_file.py, findings.py    a file as the manifest says; all that is wrong in a folder
journal.py                      the work folder of a run that can be resumed
slice.py, pull.py, origins.py   a precision out of a folder, a server, the Hub
export.py                       one level as a dense model
"""

from .config import QuantizationConfig, StoredGroup
from .embeddings import Embeddings
from .files import Manifest
from .findings import Finding
from .reader import Checkpoint
from .writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "Embeddings",
    "Finding",
    "Manifest",
    "QuantizationConfig",
    "StoredGroup",
]
