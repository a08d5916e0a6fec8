"""Compare methods: encode, evaluate and weigh each on the same model, calibration and text.

Steps:
    1. the unquantized model reads the calibration once, block by block; the Gram matrices of every
       input group are kept (folder.py). All methods get these: token weights as in
       `models.statistics`, the activations of the unquantized model, no damping yet;
    2. method by method, block by block: encode at all levels, keep decoded weights and costs;
    3. the method's levels are run by the original model with these weights in place, on the same
       windows; KL and loss are paired with the original's (`evaluation.perplexity`).
With `blocks`, only the first blocks are quantized, for all methods alike; the rest is as it was.

What is counted:
    true bits  decoder: bytes read at a level over the weights that were coded. Whole: the same,
               with 16 bits for each parameter that was not coded, over all parameters
    disk       all checkpoints needed to serve every level, each with its uncoded parameters
    seconds    encoding all levels, without the calibration pass, which all share and which is
               reported once
    kinds      of methods that make several things of one level: which, and of what share of the
               weights
    peak       resident memory of the process while it encodes (host memory; where the system
               cannot reset its mark, the largest so far)
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.objective import weighted_errors
from dropbydrop.evaluation.perplexity import evaluate
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.pretrained import read_model
from dropbydrop.system.console import progress_bar, quiet_transformers
from dropbydrop.system.digest import digest
from dropbydrop.system.memory import peak_memory
from dropbydrop_research.baselines import Level, Method, Problem, Suite
from dropbydrop_research.sources import files_of

from .folder import RESULT, BlockGrams, Folder, Record
from .job import Job, fingerprint
from .price import price_of_nesting

_PEAK_RESET = Path("/proc/self/clear_refs")
_EVALUATION = ("evaluation/perplexity.py",)  # what figures depend on beside weights and text


def compare(job: Job, out: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Encode, evaluate and weigh all methods.

    Args:
        job: what `prepare` gives.
        out: folder for what is finished; the same job with the same folder goes on where it was.
            Without one nothing is kept.

    Returns:
        JSON-able: {"model", "bits", "blocks", "of_blocks", "text", "windows", "seq_len", "tokens",
        "sha256", "calibration", "calibration_seconds", "preset", "seed", "device", "torch",
        "threads", "reference": {"ppl", "nll"}, "methods": {name: {"title", "nested", "lacks",
        "checkpoints", "disk_bytes", "seconds", "peak_gib", "bits": {level: {"true_bits",
        "true_bits_whole", "bytes", "rel_error", and what `evaluate` gives}}}},
        "price_of_nesting" (price.py)}.

    Raises:
        DropError: anything about the input, or `out` holds something else.
    """
    with ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dropbydrop-")))
        folder = stack.enter_context(Folder(out, fingerprint(job)))
        described, seconds = _capture(job, folder, progress)
        methods: dict[str, Any] = {}
        reference: dict[str, Any] = {}
        for method in job.methods:
            _encode(job, folder, method, progress)
            found = _evaluate(job, folder, method, progress)
            reference = found["reference"]
            methods[method.name] = _weigh(job, folder, method, found["bits"])
        result = {
            "model": job.source.name,
            "bits": list(job.levels),
            "blocks": job.blocks,
            "of_blocks": job.runner.num_blocks,
            **job.described,
            "calibration": described,
            "calibration_seconds": seconds,
            "preset": job.config.preset,
            "seed": job.config.seed,
            "device": str(job.runner.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "reference": {name: reference[name] for name in ("ppl", "nll")},
            "methods": methods,
            "price_of_nesting": price_of_nesting(methods, reference["per_window"]),
        }
        folder.write_json(out / RESULT, result)
    return result


# ---- 1. statistics -------------------------------------------------------------------------


def _capture(job: Job, folder: Folder, progress: bool) -> tuple[dict[str, Any], float]:
    """Gram matrices of the first blocks, unless they are there; their text, and seconds."""
    runner, blocks = job.runner, range(job.blocks)
    if not all(folder.has_grams(i) for i in blocks):
        text = job.calibration()
        hidden = runner.embed(text.ids)
        with progress_bar(progress) as bar:
            for i in bar.track(blocks, description="statistics"):
                start = time.perf_counter()
                statistics = runner.collect_statistics(i, runner.block(i), hidden, out=hidden)
                runner.release(i)
                if not folder.has_grams(i):
                    grams = [
                        (group.modules, statistics.grams[group.name])
                        for group in statistics.input_groups
                    ]
                    seconds = time.perf_counter() - start
                    note = {"seconds": seconds, "calibration": text.description}
                    folder.write_grams(i, grams, note)
    notes = [folder.gram_note(i) for i in blocks]
    return notes[0]["calibration"], sum(note["seconds"] for note in notes)


# ---- 2. encoding ---------------------------------------------------------------------------


def _encode(job: Job, folder: Folder, method: Method, progress: bool) -> None:
    """Encode the blocks of one method that are not there yet."""
    settings = {"preset": job.config.preset} if method.uses_preset else {}
    outdated = folder.start(method, settings)
    todo = [i for i in range(job.blocks) if not folder.has_block(method, i)]
    if not todo:
        return
    levels = method.serves(job.levels)
    method.prepare(levels)
    with progress_bar(progress) as bar:
        name = f"{method.name} (changed, made again)" if outdated else method.name
        task = bar.add_task(name, total=job.blocks, completed=job.blocks - len(todo))
        number = 0  # of an input group in the model
        for i in range(job.blocks):
            grams = folder.grams(i)
            if i in todo:
                weights, record = _encode_block(job, method, levels, grams, number)
                folder.write_block(method, i, weights, record)
                bar.advance(task)
            number += len(grams)


@torch.no_grad()
def _encode_block(
    job: Job, method: Method, levels: Sequence[int], grams: BlockGrams, number: int
) -> tuple[dict[int, dict[str, Tensor]], Record]:
    """All input groups of a block; `number` of them came before it."""
    runner, device = job.runner, job.runner.device
    weights: dict[int, dict[str, Tensor]] = {p: {} for p in levels}
    errors = dict.fromkeys(levels, 0.0)
    suites: list[Suite] = []
    seconds, peak = 0.0, 0
    for k, (modules, h) in enumerate(grams):
        problem = Problem(
            {name: runner.read(f"{name}.weight", torch.float32).to(device) for name in modules},
            h.to(device),
            job.config.seed * 1_000_003 + number + k,  # as `quantize` draws it
            job.config.preset,
            job.shape,
        )
        spent, resident, coded = measured(partial(method.encode, problem, levels), device)
        seconds, peak = seconds + spent, max(peak, resident)
        for name, suite in coded.items():
            decoded = [suite.levels[p].weight for p in levels]
            relative = weighted_errors(problem.weights[name], decoded, problem.gram)
            for p, w, error in zip(levels, decoded, relative, strict=True):
                weights[p][name] = w
                errors[p] += error
            suites.append(suite)
    record = Record(
        seconds,
        peak,
        {p: sum(suite.levels[p].bytes for suite in suites) for p in levels},
        [sum(sizes) for sizes in zip(*(suite.files for suite in suites), strict=True)],
        sum(w.numel() for w in weights[levels[0]].values()),
        sorted({h.shape[0] for _, h in grams}),
        errors,
        len(suites),
        {p: kinds for p in levels if (kinds := _kinds([suite.levels[p] for suite in suites]))},
    )
    return weights, record


def _kinds(matrices: Sequence[Level]) -> dict[str, int]:
    """What a method made of how many weights."""
    found: Counter[str] = Counter()
    for matrix in matrices:
        if matrix.kind:
            found[matrix.kind] += matrix.weight.numel()
    return dict(found)


def measured(
    work: Callable[[], dict[str, Suite]], device: torch.device
) -> tuple[float, int, dict[str, Suite]]:
    """Seconds, peak resident bytes and the result of some work."""
    with suppress(OSError):
        _PEAK_RESET.write_text("5")  # Linux: forget the peak so far
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, peak_memory(), result


# ---- 3. evaluation -------------------------------------------------------------------------


class Substituted:
    """The original model, run with some of its weights replaced.

    One copy of the model serves all levels; the replaced weights are put back after every call.
    """

    def __init__(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def __call__(self, ids: Tensor) -> Any:
        before: dict[str, Tensor] = {}
        try:
            for name, weight in self.weights.items():
                parameter = self.model.get_parameter(f"{name}.weight")
                before[name] = parameter.data
                parameter.data = weight.to(parameter)
            return self.model(ids.to(self.model.device), use_cache=False)
        finally:
            for name, weight in before.items():
                self.model.get_parameter(f"{name}.weight").data = weight


def _evaluate(job: Job, folder: Folder, method: Method, progress: bool) -> dict[str, Any]:
    """What `evaluate` gives for the method's levels, from the folder where it is there."""
    code = digest(*files_of(*_EVALUATION))
    key = {"blocks": job.blocks, "code": code, **job.described}
    if (known := folder.evaluation(method, key)) is not None:
        return known
    with quiet_transformers():
        model = read_model(job.source.folder, dtype=torch.float32)
    model.eval().to(job.runner.device)
    views = {
        str(p): Substituted(model, folder.weights(method, p, job.blocks))
        for p in method.serves(job.levels)
    }
    result = evaluate(views, model, job.ids, progress=progress)
    folder.write_evaluation(method, key, result)
    return result


# ---- 4. the table --------------------------------------------------------------------------


def _weigh(
    job: Job, folder: Folder, method: Method, evaluated: Mapping[str, Any]
) -> dict[str, Any]:
    """A method's row: its evaluation with bits, disk, time and memory."""
    records = [folder.record(method, i) for i in range(job.blocks)]
    levels = method.serves(job.levels)
    widths = {width for record in records for width in record.widths}
    values = sum(record.values for record in records)
    parameters = _parameters(job.runner)
    rest = 2 * (parameters - values)
    shared = {p: method.shared(p, widths) for p in levels}
    rows = {}
    for p in levels:
        size = sum(record.bytes[p] for record in records) + shared[p]
        rows[str(p)] = {
            "true_bits": 8 * size / values,
            "true_bits_whole": 8 * (size + rest) / parameters,
            "bytes": size + rest,
            "rel_error": sum(r.errors[p] for r in records) / sum(r.matrices for r in records),
            **_shares([record.kinds.get(p, {}) for record in records], values),
            **evaluated[str(p)],
        }
    files = [sum(sizes) for sizes in zip(*(record.files for record in records), strict=True)]
    extra = [shared[levels[-1]]] if method.nested else [shared[p] for p in levels]
    return {
        "title": method.title,
        "nested": method.nested,
        "lacks": [p for p in job.levels if p not in levels],
        "checkpoints": len(files),
        "disk_bytes": sum(files) + sum(extra) + len(files) * rest,
        "seconds": sum(record.seconds for record in records),
        "peak_gib": max(record.peak for record in records) / 2**30,
        "bits": rows,
    }


def _shares(blocks: Sequence[Mapping[str, int]], values: int) -> dict[str, dict[str, float]]:
    """{"kinds": {what: share of all weights}}, the most first; nothing where there is one kind."""
    total: Counter[str] = Counter()
    for kinds in blocks:
        total.update(kinds)
    return {"kinds": {k: n / values for k, n in total.most_common()}} if total else {}


def _parameters(runner: BlockRunner) -> int:
    """Parameters of the original model, tied ones once."""
    state = runner.model.state_dict(keep_vars=True)
    inside = [name for name in state if name.startswith(f"{runner.blocks_name}.")]
    return sum(state[name].numel() for name in [*runner.outer_names(), *inside])
