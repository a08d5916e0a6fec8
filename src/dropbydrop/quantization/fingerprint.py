"""What the bytes of a checkpoint depend on: work that is resumed must agree in all of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch
import transformers

from dropbydrop.data.calibration import file_of
from dropbydrop.system.digest import CODING_ROOMS, code_digest, digest, model_digest
from dropbydrop.system.version import __version__

from .job import Job


def fingerprint(job: Job) -> dict[str, Any]:
    """Model, settings by the names of their options, calibration text, code and libraries."""
    if job.ready is not None:
        content = job.ready.ids.contiguous().numpy().tobytes()
        text: list[Any] = [job.ready.description, hashlib.sha256(content).hexdigest()]
    else:
        file = file_of(job.config.calibration)
        text = [job.config.calibration, None if file is None else digest(file)]
    rooms = (*CODING_ROOMS, "tuning") if job.config.tune else ()
    return {
        "model": model_digest(job.source.folder),
        **job.config.by_option(),
        "tune": bool(job.config.tune),
        "calibration": text,
        "effort": asdict(job.effort),
        "dropbydrop": [__version__, code_digest(*rooms)],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
