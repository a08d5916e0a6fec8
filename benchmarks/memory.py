"""What a model takes, against what its plan predicts, on a random model of 1 GB or more.

    python benchmarks/memory.py                          # a random Llama of 1.1 GB in bfloat16
    python benchmarks/memory.py --out OUT                # a checkpoint of your own
    python benchmarks/memory.py --make DIR               # only write the random checkpoint to DIR

Random codes weigh what real ones weigh. Every precision runs in a process of its own: imports and a
first product are done, resident anonymous memory is noted, the model is loaded, reads a prompt of
--context tokens less 8, and generates 8. Reported beside the prediction of `Plan.memory`:

    held       unique tensor bytes, which must be the predicted weights exactly
    resident   growth of resident anonymous memory once it has generated (weights, packed
               layouts, cache)
    peak       the largest it was in between (prediction: the same and the activations)

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
         "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip


def make_random(folder: Path) -> Path:
    """A checkpoint of random codes, with the writer that the tests use."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from helpers import input_sites, write_checkpoint

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    errors = {"2": 0.1, "3": 0.03, "4": 0.01}  # an average needs some; which is all the same here
    log = "".join(
        json.dumps({"module": module, "rel_error": errors}) + "\n"
        for _, modules in input_sites(model)
        for module in modules
    )
    files = {"quantize-log.jsonl": log.encode()}
    return write_checkpoint(folder, model, extra_files=files)


def measure(out: str, bits: str, context: int) -> dict[str, float]:
    """In this process: load, generate, compare."""
    import torch

    import dropbydrop
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.commands.common import parse_precision
    from dropbydrop.memory import held_bytes

    torch.ones(64, 64) @ torch.ones(64, 64)
    checkpoint = Checkpoint.open(out)
    warm = _status("RssAnon")
    model = dropbydrop.load(out, bits=parse_precision(bits), dtype=torch.bfloat16)
    plan = dropbydrop.plan_of(model)
    ids = torch.randint(5, 200, (1, context - 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        kept = model.generate(ids, do_sample=False, min_new_tokens=8, max_new_tokens=8,
                              pad_token_id=0, return_dict_in_generate=True)  # fmt: skip
    need = plan.memory(checkpoint, torch.bfloat16, context)
    after, peak = _status("RssAnon"), _status("VmHWM") - _status("RssFile")
    del kept
    return {
        "bits": plan.average_bits(checkpoint),
        "held": held_bytes(model),
        "predicted_weights": need.weights - need.shared,
        "resident": after - warm,
        "predicted_resident": need.total - need.activations,
        "peak": peak - warm,
        "predicted_peak": need.total,
    }


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path, metavar="DIR")
    parser.add_argument("--bits", default="2,2.5,3,4")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this process measures that precision
    args = parser.parse_args()
    if args.make:
        print(make_random(args.make))
        return
    if args.one:
        print(json.dumps(measure(str(args.out), args.one, args.context)))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or make_random(Path(folder) / "random-1gb")
        rows = []
        print(
            f"{'bits':>6}{'held MB':>9}{'=':>3}{'resident':>10}{'ratio':>7}{'peak':>8}{'ratio':>7}"
        )
        for bits in args.bits.split(","):
            command = [sys.executable, __file__, "--out", str(out), "--one", bits,
                       "--context", str(args.context)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            exact = "yes" if row["held"] == row["predicted_weights"] else "NO"
            print(f"{row['bits']:6.2f}{row['held'] / 1e6:9.1f}{exact:>4}"
                  f"{row['resident'] / 1e6:9.1f}"
                  f"{row['resident'] / row['predicted_resident']:7.3f}{row['peak'] / 1e6:8.1f}"
                  f"{row['peak'] / row['predicted_peak']:7.3f}")  # fmt: skip
    name = out.name if args.out else "random Llama, hidden 2048, 10 blocks"
    print(json.dumps({"benchmark": "memory", "checkpoint": name, "context": args.context,
                      "rows": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
