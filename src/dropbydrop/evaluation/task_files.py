"""Local files of the zero-shot tasks, in the form that the harness' task definitions expect.

A data folder has one folder a task, with the official file of the split that the harness
evaluates, or one with the fields of the hub's version:

    winogrande/dev.jsonl             {"sentence", "option1", "option2", "answer": "1" or "2"}
    piqa/valid.jsonl                 {"goal", "sol1", "sol2", "label"}, or without "label" and with
                                     valid-labels.lst beside it, a line each
    hellaswag/hellaswag_val.jsonl    {"activity_label", "ctx_a", "ctx_b", "endings", "label"}
    hellaswag/hellaswag_val_full.txt[.bz2]
                                     six lines an item: "activity: context", label, four endings
    arc_easy/test.jsonl              {"question", "choices": {"text", "label"}, "answerKey"}, AI2's
    arc_challenge/test.jsonl         own form, or {"question", "choices": [text, …], "gold": index}

`validation.jsonl` (for ARC `test.jsonl`) is found for every task. The text form of HellaSwag has
lost one thing: the harness capitalises ctx_b, the clause to be continued, and this form has it
joined to the rest. A last clause that starts in lower case and is unfinished is taken for it, which
is right for all but 7 of the 3,243 items with such a clause.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropbydrop.system.errors import DropError
from dropbydrop.system.paths import given

Row = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    """Where a task's items lie, which split the harness evaluates, which fields it reads, and
    where in the harness its definition is."""

    files: tuple[str, ...]
    split: str
    fields: tuple[str, ...]
    definition: str


_ARC = ("question", "choices", "answerKey")
TASKS: dict[str, _Task] = {
    "winogrande": _Task(
        ("dev.jsonl", "validation.jsonl"),
        "validation",
        ("sentence", "option1", "option2", "answer"),
        "winogrande/default.yaml",
    ),
    "piqa": _Task(
        ("valid.jsonl", "validation.jsonl"),
        "validation",
        ("goal", "sol1", "sol2", "label"),
        "piqa/piqa.yaml",
    ),
    "hellaswag": _Task(
        (
            "hellaswag_val.jsonl",
            "validation.jsonl",
            "hellaswag_val_full.txt",
            "hellaswag_val_full.txt.bz2",
        ),
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        "hellaswag/hellaswag.yaml",
    ),
    "arc_easy": _Task(("test.jsonl",), "test", _ARC, "arc/arc_easy.yaml"),
    "arc_challenge": _Task(("test.jsonl",), "test", _ARC, "arc/arc_challenge.yaml"),
}
"""The five tasks of the usual zero-shot comparison, by their names in the harness."""

_LETTERS = "ABCDEFGH"
_LAST_CLAUSE = re.compile(r"(.*[.!?]['\")\]]*) ([a-z][^.!?]*)", re.DOTALL)


@dataclass(frozen=True)
class Items:
    """Items of a task, with the harness' fields, and the file they were read from."""

    task: str
    rows: list[Row]
    file: Path
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What the report says about the data: {"file", "sha256", "items"}."""
        return {"file": self.file.name, "sha256": self.sha256, "items": len(self.rows)}


def read_items(data: Path, task: str) -> Items:
    """Read the items of `task` from `data`/`task`; see the module's note.

    Raises:
        DropError: a task without a known local form, no such file, or one of another form.
    """
    if task not in TASKS:
        raise DropError(
            f"{task} cannot be read from local files, only {', '.join(TASKS)}; leave --tasks-data "
            "(and DROPBYDROP_DATA) out to load it from the hub."
        )
    folder = given(data) / task
    paths = [folder / name for name in TASKS[task].files]
    file = next((path for path in paths if path.is_file()), None)
    if file is None:
        raise DropError(
            f"{folder} holds none of {', '.join(TASKS[task].files)}; put the items of {task} "
            "there, or leave --tasks-data (and DROPBYDROP_DATA) out to load them from the hub."
        )
    try:
        content = file.read_bytes()
        text = (bz2.decompress(content) if file.suffix == ".bz2" else content).decode("utf-8")
    except (OSError, ValueError, EOFError) as error:
        raise DropError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    if file.name.endswith((".txt", ".bz2")):
        rows = _text_form(text, file)
    else:
        rows = _rows(text, file, task)
    if not rows:
        raise DropError(f"{file} holds no items.")
    return Items(task, rows, file, hashlib.sha256(content).hexdigest())


def write_tasks(folder: Path, items: Mapping[str, Items], definitions: Mapping[str, Path]) -> None:
    """Task definitions for the harness: its own, included, with local items.

    Args:
        folder: an empty folder, also used by the datasets library for its intermediate files.
        definitions: task -> the harness' own YAML.
    """
    for name, found in items.items():
        split = TASKS[name].split
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found.rows), encoding="utf-8")
        lines = {
            "include": str(definitions[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path)},
                "cache_dir": str(folder / "cache"),
                "keep_in_memory": True,
            },
            "training_split": None,
            "validation_split": split if split == "validation" else None,
            "test_split": split if split == "test" else None,
        }
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")  # JSON values are YAML


def _rows(text: str, file: Path, task: str) -> list[Row]:
    """JSON lines, each turned into the harness' fields."""
    adapt: Callable[[Row], Row] = _arc if TASKS[task].fields is _ARC else dict
    rows: list[Row] = []
    labels = _piqa_labels(file) if task == "piqa" else None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = adapt(json.loads(line))
            if labels is not None:
                row["label"] = labels[len(rows)]
            if task == "hellaswag":
                row["label"] = str(row["label"])
            rows.append({field: row[field] for field in TASKS[task].fields})
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DropError(
                f"{file}, line {number}, is no item of {task}: expected "
                f"{', '.join(TASKS[task].fields)} ({type(error).__name__}: {error})."
            ) from error
    if labels is not None and len(labels) != len(rows):
        raise DropError(f"{file} has {len(rows)} items, but its label file {len(labels)} labels.")
    return rows


def _piqa_labels(file: Path) -> list[int] | None:
    """Labels of the official PIQA file: a line each, in a file of its own; None without it."""
    path = file.with_name(f"{file.stem}-labels.lst")
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8").split()
    if bad := set(words) - {"0", "1"}:
        raise DropError(f"{path} holds labels {sorted(bad)[:3]}; PIQA's are 0 and 1.")
    return [int(word) for word in words]


def _arc(row: Row) -> Row:
    """ARC's forms -> the hub's: choices {"text", "label"}, answerKey a label."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):  # AI2's own file
        question, choices = question["stem"], question["choices"]
        texts = [choice["text"] for choice in choices]
        labels, key = [choice["label"] for choice in choices], row["answerKey"]
    elif isinstance(choices, dict):
        texts, labels, key = choices["text"], choices["label"], row["answerKey"]
    else:
        texts = list(row["choices"])
        labels, key = list(_LETTERS[: len(texts)]), _LETTERS[row["gold"]]
    if key not in labels or len(texts) != len(labels):
        raise ValueError(f"answer {key!r} is not among the choices {labels}")
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def _text_form(text: str, file: Path) -> list[Row]:
    """HellaSwag's text form; see the module's note."""
    lines = text.splitlines()
    if len(lines) % 6:
        raise DropError(f"{file} has {len(lines)} lines; items take six lines each.")
    rows = []
    for i in range(0, len(lines), 6):
        activity, colon, context = lines[i].partition(": ")
        if not colon or lines[i + 1] not in ("0", "1", "2", "3"):
            raise DropError(
                f"{file}, line {i + 1}: expected 'activity: context', then a label 0 to 3."
            )
        clause = _LAST_CLAUSE.fullmatch(context)
        ctx_a, ctx_b = clause.groups() if clause else (context, "")
        rows.append(
            {
                "activity_label": activity,
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "endings": lines[i + 2 : i + 6],
                "label": lines[i + 1],
            }
        )
    return rows
