"""Calibrating on text that the model writes itself, against in-domain text, on a third text.

    python research/experiments/data_free.py MODEL --in-domain FILE --text EVAL_FILE --folder FOLDER
        [--variants temperature=0.8 text_tokens=256,conversations=0 ...]

Every variant is one quantization at levels 2, 3 and 4 that differs from the others in its
calibration windows alone: "in-domain", drawn from FILE, and the model's own text, written as each
VARIANT says (fields of `Writing` in data/self_generated.py, and seed; "default" changes nothing).
All are evaluated on the same windows of EVAL_FILE, which no calibration has seen. Embedding and
head stay in 16 bits.

Printed for each: the excess loss over the original in nats a token at --level, its ratio to that of
the in-domain calibration, and the same ratio for the KL, with 95 % intervals of a paired bootstrap
over windows. The interval is for these windows; how much the text itself varies shows from variants
with other seeds.

FOLDER keeps the windows of each variant, the work of an interrupted quantization, and one line of
results.jsonl for each finished variant: the same command goes on, and more variants can be added.
Other settings are refused. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dropbydrop
from dropbydrop.data.calibration import SELF, Calibration, load_windows
from dropbydrop.data.self_generated import Writing
from dropbydrop.data.text_files import text_windows
from dropbydrop.evaluation.perplexity import bootstrap_interval, evaluate
from dropbydrop.models.sources import Source, resolve
from dropbydrop.quantization.config import WINDOWS
from dropbydrop.quantization.pipeline import quantize
from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError
from dropbydrop_research.compare.price import paired_ratio

IN_DOMAIN = "in-domain"
VARIANTS = [
    "default",
    "seed=1",
    "temperature=0.8",
    "temperature=0.9",
    "temperature=1.1",
    "text_tokens=256",
    "text_tokens=1024",
    "conversations=0",
    "conversations=1",
]
LEVELS = (2, 3, 4)


def parse(variant: str) -> tuple[int, Writing]:
    """ "temperature=0.8,seed=1" -> (1, Writing(temperature=0.8)).

    Raises:
        DropError: an unknown field, or a value that it cannot have.
    """
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Writing)} | {"seed": int}
    values: dict[str, Any] = {}
    for part in variant.split(",") if variant != "default" else []:
        name, _, value = part.partition("=")
        try:
            values[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            raise DropError(
                f"variant {variant!r}: {part!r} is not one of {', '.join(kinds)} with a number; "
                "give for example temperature=0.8,text_tokens=256."
            ) from error
    seed = values.pop("seed", 0)
    try:
        return seed, Writing(**values)
    except ValueError as error:
        raise DropError(f"variant {variant!r}: {error}.") from error


def windows_of(variant: str, source: Source, args: argparse.Namespace) -> tuple[Calibration, float]:
    """Calibration windows of a variant, from the folder if it has them; the seconds they took."""
    path = args.folder / f"{variant}.windows.safetensors"
    if not path.exists():
        start = time.perf_counter()
        if variant == IN_DOMAIN:
            seed, spec, writing = 0, args.in_domain, None
        else:
            (seed, writing), spec = parse(variant), SELF
        text = load_windows(
            spec, source.tokenizer(), args.windows, args.seq_len, seed, source=source,
            writing=writing,
        )  # fmt: skip
        notes = {"description": text.description, "seconds": time.perf_counter() - start}
        partial = path.with_suffix(".partial")
        save_file({"ids": text.ids}, partial, {"notes": json.dumps(notes)})
        partial.rename(path)
    with safe_open(path, "pt") as file:
        notes = json.loads(file.metadata()["notes"])
        return Calibration(file.get_tensor("ids"), notes["description"]), notes["seconds"]


def measure(
    variant: str, source: Source, ids: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """One line of the results: quantize with the windows of a variant, evaluate, tidy up."""
    text, seconds = windows_of(variant, source, args)
    out = args.folder / f"{variant}.checkpoint"
    if not out.exists():
        quantize(
            source.folder, out, LEVELS, calibration=text, preset=args.preset, head_bits=16,
            resume=True,
        )  # fmt: skip
    start = time.perf_counter()
    with quiet_transformers():
        reference = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
        model = dropbydrop.load(out, bits=args.level, dtype=torch.float32)
    found = evaluate({"model": model}, reference, ids)
    line = {
        "variant": variant,
        "calibration": text.description,
        "reference": found["reference"]["per_window"],
        **found["bits"]["model"]["per_window"],
        "seconds": {"text": seconds, "evaluate": time.perf_counter() - start},
    }
    shutil.rmtree(out)
    return line


def keep(lines: dict[str, dict[str, Any]], file: Path) -> None:
    """Write all lines, or leave the file as it was."""
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    partial.rename(file)


def finished(file: Path) -> dict[str, dict[str, Any]]:
    """Lines of the results, by variant."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {line["variant"]: line for line in map(json.loads, lines)}


def figures(line: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; `base` is the line of the in-domain calibration."""
    tensors = [
        {k: torch.tensor(x[k], dtype=torch.float64) for k in ("nll", "kl", "reference")}
        for x in (line, base)
    ]
    excess, excess_base = (t["nll"] - t["reference"] for t in tensors)
    loss = paired_ratio(excess, excess_base)
    kl = paired_ratio(tensors[0]["kl"], tensors[1]["kl"])
    return {
        "variant": line["variant"],
        "excess": float(excess.mean()),
        "excess_interval": bootstrap_interval(excess),
        "excess_ratio": loss[0],
        "excess_ratio_interval": loss[1],
        "kl": float(tensors[0]["kl"].mean()),
        "kl_ratio": kl[0],
        "kl_ratio_interval": kl[1],
        "seconds": line["seconds"],
    }


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--in-domain", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("--preset", default="fast", choices=WINDOWS)
    parser.add_argument("--windows", type=int, help="of the calibration [from the preset]")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--level", type=int, default=3, choices=LEVELS)
    parser.add_argument("--eval-windows", type=int, default=16)
    args = parser.parse_args()
    args.windows = args.windows or WINDOWS[args.preset]
    for variant in args.variants:
        parse(variant)
    source = resolve(args.model)
    ids, described = text_windows(args.text, source.tokenizer(), args.seq_len, args.eval_windows)
    settings = {
        "model": source.name,
        "in_domain": args.in_domain.name,
        "evaluated": described,
        "preset": args.preset,
        "windows": args.windows,
        "level": args.level,
    }
    args.folder.mkdir(parents=True, exist_ok=True)
    note = args.folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise SystemExit(f"{args.folder} has results of other settings ({note}); name another.")
    note.write_text(json.dumps(settings, indent=1))
    results = args.folder / "results.jsonl"
    lines = finished(results)
    for variant in dict.fromkeys([IN_DOMAIN, *args.variants]):
        if variant not in lines:
            print(f"{variant} ...", flush=True)
            lines[variant] = measure(variant, source, ids, args)
            keep(lines, results)
    rows = [figures(line, lines[IN_DOMAIN]) for line in lines.values()]
    print("| calibration | excess loss | its ratio to in-domain | KL | ratio |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['variant']} | {row['excess']:.4f}{_between(row['excess_interval'])} "
            f"| {row['excess_ratio']:.3f}{_between(row['excess_ratio_interval'])} "
            f"| {row['kl']:.4f} | {row['kl_ratio']:.3f}{_between(row['kl_ratio_interval'])} |"
        )
    print(json.dumps({"benchmark": "data_free", **settings, "rows": rows}))


if __name__ == "__main__":
    main()
