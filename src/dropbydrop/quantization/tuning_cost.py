"""What the tuning of a run will take: that of tuning/cost.py, with its text and its files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from dropbydrop.data.calibration import SELF
from dropbydrop.data.self_generated import Writing, writing_seconds
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.system.errors import DropError
from dropbydrop.tuning.cost import Cost, cost
from dropbydrop.tuning.job import draw_windows, fitting

from .job import Job, check_tuning


def tuning_cost(job: Job, groups: Sequence[InputGroup], blocks: float, writing: float) -> Cost:
    """What tuning takes, or would take where preset `best` leaves it to the user.

    Args:
        groups: input groups of block 0; blocks: the model, in blocks like the first.
        writing: seconds to write the checkpoint.
    """
    optional = job.config.preset == "best" and job.config.tune is None and not job.untuned
    try:
        if optional:
            check_tuning(job)
    except DropError:  # it could not be asked for either
        optional = False
    if not (job.config.tune or optional):
        return Cost(0.0, 0, 0)
    config, ready = job.tuning()
    config, text = fitting(config, job.runner), 0.0
    if ready is None and config.calibration == SELF:
        text = writing_seconds(
            job.source.folder, config.windows, config.seq_len, Writing(), job.runner.device
        )
    elif ready is None:
        started = time.perf_counter()
        draw_windows(config, job.source, job.runner)
        text = time.perf_counter() - started
    levels, books = job.config.levels, job.universal().to(job.runner.device)
    found = cost(job.runner, config, groups, books, levels, blocks)
    job.runner.release(0)
    # compared with its manifest, copied, and read back
    return replace(found, seconds=found.seconds + text + 2.3 * writing)
