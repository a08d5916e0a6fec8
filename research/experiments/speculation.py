"""Self-speculative decoding: acceptance, costs, and speed over draft length, against the formula.

    python research/experiments/speculation.py OUT --text FILE [--picture docs/images/speculation]

Prompts are the first --prompt tokens of windows spread over FILE; each is continued greedily by
--tokens tokens, plainly and with every draft and draft length, interleaved, so that all see the
same state of the machine. "measured" is plain seconds a token over seconds a token of the rounds
with a draft, "formula" is (1 - a^(k+1)) / ((1 - a) (k c + v)) from the a, c, v of that run; both
are medians over prompts. The output is compared with plain decoding, token by token.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

import dropbydrop
from dropbydrop.data.text_files import text_windows
from dropbydrop.kernels import select
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.runtime.speculate import Costs, Speculator
from dropbydrop.system.console import quiet_transformers
from dropbydrop_research.study.style import new_figure, save, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def acceptance_needed(c: float, slope: float, target: float = 1.2) -> float | None:
    """The smallest acceptance at which some k reaches the speed `target`; None if none does."""

    def reached(a: float) -> bool:
        costs = Costs(a, c, slope)
        return costs.speedup(costs.best()) >= target

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high if reached(1.0) else None


def run(model: Any, prompts: torch.Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every draft and draft length (0: chosen by the program)."""
    drafts = [int(part) for part in args.drafts.split(",")]
    lengths = [int(part) for part in args.lengths.split(",")]
    speculators = {
        (bits, k): Speculator(model, bits, draft_tokens=k or None)
        for bits in drafts
        for k in lengths
    }
    settings = {"do_sample": False, "min_new_tokens": args.tokens, "max_new_tokens": args.tokens,
                "pad_token_id": 0}  # fmt: skip
    reports: dict[tuple[int, int], list[Any]] = {key: [] for key in speculators}
    equal: dict[tuple[int, int], list[bool]] = {key: [] for key in speculators}
    whole: dict[tuple[int, int], list[float]] = {key: [] for key in speculators}
    with quiet_transformers(), torch.inference_mode():
        for prompt in prompts:
            start = time.perf_counter()
            plain = model.generate(prompt[None], **settings)
            seconds = time.perf_counter() - start
            for key, fast in speculators.items():
                found = fast.generate(prompt[None], **settings)
                reports[key].append(fast.report)
                equal[key].append(bool(torch.equal(found, plain)))
                whole[key].append(seconds / fast.report.seconds)
    rows = []
    for (bits, k), found in reports.items():
        known = [r for r in found if r.a is not None]
        if not known:
            continue
        a, c = mean(r.a for r in known), median(r.c for r in known)
        v, used = median(r.v for r in known), round(median(r.k for r in known))
        rows.append(
            {
                "draft_bits": bits,
                "k": k or "chosen",
                "used_k": used,
                "a": a,
                "c": c,
                "v": v,
                "formula": median(r.predicted for r in known),
                "measured": median(r.measured for r in known),
                "whole_generation": median(whole[bits, k]),
                "switched_off": sum(r.switched_off for r in found),
                "a_for_1_2": acceptance_needed(c, max((v - 1) / used, 0.0)),
                "equal": sum(equal[bits, k]),
                "prompts": len(found),
                "plain_ms": 1e3 * median(r.plain_seconds for r in known),
            }
        )
    return rows


@styled
def plot(rows: list[dict[str, Any]]) -> Figure:
    """Speed over draft length: measured points on the line of the formula."""
    figure, axes = new_figure(1, 1, 5.2, 3.4)
    axis = axes[0, 0]
    for i, bits in enumerate(sorted({row["draft_bits"] for row in rows})):
        fixed = [row for row in rows if row["draft_bits"] == bits and row["k"] != "chosen"]
        ks = [row["k"] for row in fixed]
        axis.plot(ks, [row["formula"] for row in fixed], label=f"{bits}-bit draft, formula",
                  **series(i, marker=""))  # fmt: skip
        axis.plot(ks, [row["measured"] for row in fixed], label=f"{bits}-bit draft, measured",
                  **series(i, linestyle=""))  # fmt: skip
    axis.axhline(1.0, color="#777777", linewidth=0.8)
    axis.set(xlabel="draft length k", ylabel="speed relative to plain decoding")
    axis.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--drafts", default="2,3")
    parser.add_argument("--lengths", default="1,2,3,4,6,8,12,0", help="0: chosen by measurement")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path, help="stem of a PNG and an SVG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids, described = text_windows(args.text, load_tokenizer(args.out), args.prompt)
    ids = ids[:: max(1, len(ids) // args.prompts)][: args.prompts]
    with quiet_transformers():
        model = dropbydrop.load(args.out, dtype=getattr(torch, args.dtype))
    rows = run(model, ids, args)
    print(f"{'draft':>5}{'k':>8}{'a':>7}{'c':>7}{'v':>7}{'formula':>9}{'measured':>10}"
          f"{'whole':>7}{'equal':>7}{'a for 1.2x':>12}")  # fmt: skip
    for r in rows:
        need = "" if r["a_for_1_2"] is None else f"{r['a_for_1_2']:.2f}"
        print(f"{r['draft_bits']:5}{r['k']!s:>8}{r['a']:7.3f}{r['c']:7.3f}{r['v']:7.3f}"
              f"{r['formula']:9.3f}{r['measured']:10.3f}{r['whole_generation']:7.3f}"
              f"{r['equal']:4}/{r['prompts']}{need:>10}")  # fmt: skip
    if args.picture:
        save(plot(rows), args.picture)
    result = {"benchmark": "speculation", "checkpoint": args.out.name, **described,
              "kernel": select().name, "threads": args.threads, "tokens": args.tokens,
              "bits": dropbydrop.precision(model), "rows": rows}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
