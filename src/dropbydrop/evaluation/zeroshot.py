"""Zero-shot accuracy through lm-evaluation-harness, offline from local files or from the hub.

The harness does all that decides a number: prompts, choices, scoring, standard errors. Two things
are ours. A loop over models (precision views, the original) on the same items, with the paired
difference from the original; and the data: with a folder of local files, the harness' own task
definition is included unchanged and only where its items come from is replaced (zeroshot_data.py).

Numbers are those of the harness run directly with the same items, data type, batch size and
`limit`: it takes the first items of the split. No cache of answers is used (the harness keys it by
the request alone, so that precisions would read each other's).

A precision is evaluated as the dense model that it decodes to, one at a time.

Accuracies are fractions in [0, 1]. Each has a standard error over items. Errors of different
models are not independent, they answer the same items: `difference` has the standard error of the
mean of the per-item differences.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dropbydrop.runtime.hf import DropByDropQuantizer
from dropbydrop.runtime.views import plan_of, view
from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError, first_line

from .task_files import TASKS, read_items, write_tasks

SEEDS = {  # the harness' defaults, said explicitly; zero-shot scoring draws nothing
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
METRICS = ("acc", "acc_norm")


def parse_tasks(text: str) -> list[str]:
    """ "piqa,arc_easy" -> ["piqa", "arc_easy"]; "all" -> the five tasks of TASKS.

    Raises:
        DropError: no name, or one twice.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    names = list(TASKS) if names == ["all"] else names
    if not names or len(set(names)) < len(names):
        raise DropError(f"--tasks {text!r}: name each task once, such as piqa,arc_easy, or all.")
    return names


def run(
    models: Mapping[str, Any],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    reference: str = "reference",
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate every model on every task, one model after the other.

    Args:
        models: name -> PreTrainedModel in eval mode, on any device.
        tokenizer: of all the models.
        tasks: names of the harness; with `data`, of TASKS.
        data: folder with a folder for each task; without it the harness loads from the hub.
        limit: only the first so many items of each task.
        reference: name in `models` that the others are compared with, if it is there.

    Returns:
        JSON-able: {"names", "limit", "batch_size", "seeds", "versions": {"lm_eval", "transformers",
        "torch", "tasks": {task: version}}, "data": {task: description} or "hub", "models": {name:
        {"tasks": {task: {"items", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr",
        "difference", "difference_stderr"}}, "mean": {"acc", "acc_stderr"}}}}. acc_norm only where
        the task defines it; difference, of acc, only beside a reference.

    Raises:
        DropError: the harness is not installed, a task it does not know, data that cannot be read
            or downloaded.
    """
    if limit is not None and limit < 1:
        raise DropError(f"--limit {limit}: ask for 1 item or more of each task.")
    simple_evaluate, wrapper = _harness()
    # The harness draws tqdm bars, with ETA, on stderr; off when nobody asked for progress.
    bars = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    order = sorted(models, key=lambda name: name != reference)  # the reference first
    results: dict[str, dict[str, Any]] = {}
    with _quiet(), tempfile.TemporaryDirectory(prefix="dropbydrop-tasks-") as scratch:
        manager, loaded, described = _load(tasks, data, Path(scratch))
        for name in order:
            with quiet_transformers(), bars:
                lm = wrapper(_dense(models[name]), tokenizer=tokenizer, batch_size=batch_size)
                results[name] = simple_evaluate(
                    model=lm, tasks=loaded, task_manager=manager, limit=limit, **SEEDS
                )
    base = results.get(reference)
    return {
        "names": list(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "seeds": dict(SEEDS),
        "versions": _versions(results[order[0]]),
        "data": described,
        "models": {
            name: _report(results[name], base if name != reference else None) for name in models
        },
    }


def _dense(model: Any) -> Any:
    """A view as a dense model: thousands of short requests would decode it thousands of times."""
    if not isinstance(getattr(model, "hf_quantizer", None), DropByDropQuantizer):
        return model
    return view(model, plan=plan_of(model)).dequantize()


def _harness() -> tuple[Any, Any]:
    """`simple_evaluate` and `HFLM` of lm_eval, imported when first needed.

    Raises:
        DropError: not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DropError(
            "zero-shot tasks need lm-evaluation-harness, which is not installed; "
            "`pip install 'dropbydrop[tasks]'` adds it."
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    return simple_evaluate, HFLM


def _load(
    tasks: Sequence[str], data: Path | None, scratch: Path
) -> tuple[Any, list[Any], dict[str, Any] | str]:
    """A task manager of the harness, its tasks with their items, and what the data are."""
    from lm_eval.tasks import TaskManager

    described: dict[str, Any] | str = "hub"
    definitions, manager = _definitions(tasks)
    if data is not None:
        items = {name: read_items(data, name) for name in tasks}
        described = {name: found.describe() for name, found in items.items()}
        write_tasks(scratch, items, definitions)
        manager = TaskManager(include_path=str(scratch), include_defaults=False)
    try:
        loaded = list(manager.load(list(tasks))["tasks"].values())
    except Exception as error:  # errors of datasets, of the hub and of the network share no base
        where = f"from {data}" if data is not None else "from the hub"
        raise DropError(
            f"the items of {', '.join(tasks)} cannot be loaded {where} "
            f"({first_line(error)}). Without a network, give local files with --tasks-data DIR."
        ) from error
    return manager, loaded, described


def _definitions(tasks: Sequence[str]) -> tuple[dict[str, Path], Any]:
    """The harness' YAML of every task, and a task manager that knows them.

    An index of everything that the harness has takes ten seconds, so the folders of the five tasks
    are looked at first.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.tasks.__file__).parent
    folders = {str((root / TASKS[name].definition).parent) for name in tasks if name in TASKS}
    manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    if any(name not in manager.all_subtasks for name in tasks):
        manager = TaskManager()
    if unknown := [name for name in tasks if name not in manager.all_subtasks]:
        raise DropError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}; the usual five are "
            f"{', '.join(TASKS)}."
        )
    return {name: Path(str(manager.task_index[name].yaml_path)) for name in tasks}, manager


def _report(result: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the harness found for one model, and the differences from `base`."""
    table: dict[str, dict[str, Any]] = {}
    for task, found in result["results"].items():
        row: dict[str, Any] = {"items": result["n-samples"][task]["effective"]}
        for metric in METRICS:
            if f"{metric},none" in found:
                row[metric] = float(found[f"{metric},none"])
                row[f"{metric}_stderr"] = _number(found.get(f"{metric}_stderr,none"))
        if base is not None:
            row |= _difference(result["samples"][task], base["samples"][task])
        table[task] = row
    return {"tasks": table, "mean": _mean(table)}


def _difference(
    samples: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """Mean of the per-item differences of acc, and its standard error (None for one item)."""
    before = {sample["doc_id"]: sample["acc"] for sample in base if "acc" in sample}
    deltas = [s["acc"] - before[s["doc_id"]] for s in samples if s["doc_id"] in before]
    if not deltas:
        return {}
    n = len(deltas)
    mean = sum(deltas) / n
    squares = sum((d - mean) ** 2 for d in deltas)
    stderr = math.sqrt(squares / (n - 1) / n) if n > 1 else None
    return {"difference": mean, "difference_stderr": stderr}


def _mean(table: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean of acc over tasks; tasks share no items, so variances add."""
    values = [row["acc"] for row in table.values() if "acc" in row]
    errors = [row["acc_stderr"] for row in table.values() if "acc" in row]
    known = values and all(e is not None for e in errors)
    return {
        "acc": sum(values) / len(values) if values else None,
        "acc_stderr": math.sqrt(sum(e * e for e in errors)) / len(errors) if known else None,
    }


def _number(value: Any) -> float | None:
    """A finite float, or None: the harness writes "N/A" where there is no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _versions(result: Mapping[str, Any]) -> dict[str, Any]:
    import lm_eval
    import torch
    import transformers

    return {
        "lm_eval": lm_eval.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tasks": dict(result["versions"]),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of the harness about our own choices, no bars of the datasets library."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
