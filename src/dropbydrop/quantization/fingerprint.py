"""What the bytes of a checkpoint depend on: work that is resumed must agree in all of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from dropbydrop.coding.search import backends
from dropbydrop.data.calibration import SELF, Calibration
from dropbydrop.system.digest import code_digest, digest, model_digest
from dropbydrop.system.version import __version__

from .config import Job


def fingerprint(job: Job) -> dict[str, Any]:
    """Everything that the bytes of the result depend on; by the names of the options."""
    return {
        "model": model_digest(job.source.folder),
        "bits": job.levels,
        "calibration": _calibration_digest(job.calibration),
        "preset": job.preset,
        "effort": asdict(job.effort),
        "codebooks": job.codebooks,
        "seed": job.seed,
        "head-bits": job.head_bits,
        "windows": job.windows,
        "seq-len": job.seq_len,
        "device": str(job.runner.device),
        "backend": job.backend or backends(job.runner.device)[0],
        "dropbydrop": [__version__, code_digest()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _calibration_digest(calibration: str | Path | Calibration) -> list[Any]:
    """How the text is named, and the SHA-256 of what is read; None where the rest decides it."""
    if isinstance(calibration, Calibration):
        content = calibration.ids.contiguous().numpy().tobytes()
        return [calibration.description, hashlib.sha256(content).hexdigest()]
    text = Path(calibration).expanduser()
    is_file = str(calibration) != SELF and text.is_file()
    return [str(calibration), digest(text) if is_file else None]
