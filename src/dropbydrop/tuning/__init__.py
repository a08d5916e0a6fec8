"""Fine-tuning of a quantized checkpoint: codebooks, scales and norms; codes stay as they are.

`run.py` is the life-cycle, `job.py` a checked order, `distill.py` and `blocks.py` the two methods;
`student.py` is the quantized model with gradients (`decode.py`), `values.py` what is trained and
Adam, `folder.py` writes the result. docs/tuning.md has what it buys.
"""

from .pipeline import TuneReport, tune

__all__ = ["TuneReport", "tune"]
