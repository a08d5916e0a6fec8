"""Levels for each expert against levels for each stack: KL of a toy mixture at equal average bits.

    python research/experiments/expert_plans.py --text docs/log.md docs/results.md [--balance 0.02]

A mixture of 3 blocks with 16 experts, 2 a token, is trained here on the bytes of a text, minutes on
two cores; without --balance a few experts get most tokens, with it the router's own loss evens them
out, as in released models. It is quantized at the levels 2, 3 and 4, and plans of both kinds are
made from the log's errors and from measured sensitivities. KL is to the model before quantization,
in nats a token, on windows that neither training, calibration nor measuring has seen. Writes JSON,
a line for each average.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.data.calibration import Calibration
from dropbydrop.evaluation.sensitivity_probe import measure
from dropbydrop.planning.sensitivity import from_log
from dropbydrop.planning.solver import make_plan

LENGTH, HELD = 64, 32
AVERAGES = (2.25, 2.5, 2.75, 3.0, 3.25, 3.5)


def trained(windows: Tensor, steps: int, balance: float, generator: torch.Generator) -> Any:
    """A mixture after some steps on windows [n, T] of bytes."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=16, num_experts_per_tok=2, max_position_embeddings=256,
        router_aux_loss_coef=balance, output_router_logits=balance > 0, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        batch = windows[torch.randint(0, len(windows), (16,), generator=generator)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.config.output_router_logits = False
    return model.eval().requires_grad_(False)


def log_p(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(b).logits for b in windows.split(8)]).log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--balance", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    data = b"".join(file.read_bytes() for file in arguments.text)
    ids = torch.tensor(list(data[: len(data) // LENGTH * LENGTH])).view(-1, LENGTH)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    held, calibration, probe, rest = ids.split([HELD, 64, 32, len(ids) - HELD - 96])
    model = trained(rest, arguments.steps, arguments.balance, generator)
    expected = log_p(model, held)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        model.save_pretrained(source)
        windows = Calibration(calibration, {})
        dropbydrop.quantize(source, out, preset="fast", calibration=windows, progress=False)
        report(
            Checkpoint.open(out), dropbydrop.load(out, dtype=torch.float32), held, probe, expected
        )


def report(
    checkpoint: Checkpoint, model: Any, held: Tensor, probe: Tensor, expected: Tensor
) -> None:
    """Print the lines."""

    def kl(other: Any) -> float:
        return round(float((expected.exp() * (expected - log_p(other, held))).sum(-1).mean()), 5)

    loss = -expected[:, :-1].gather(-1, held[:, 1:, None]).mean()
    print(json.dumps({"held_out_loss": round(float(loss), 3)}))
    lines = (checkpoint.path / "quantize-log.jsonl").read_text().splitlines()
    counts = [entry["tokens"] for entry in map(json.loads, lines) if "tokens" in entry]
    print(json.dumps({"tokens": counts}))
    views = {p: dropbydrop.view(model, p) for p in checkpoint.levels}
    print(json.dumps({"uniform": {p: kl(view) for p, view in views.items()}}), flush=True)
    log, measured = from_log(checkpoint), measure(model, probe, progress=False)
    assert log is not None
    for bits in AVERAGES:
        row: dict[str, float] = {"bits": bits}
        for name, known in (("log", log), ("measured", measured)):
            stacks = dataclasses.replace(known, experts={})
            for kind, losses in (("stack", stacks), ("expert", known)):
                plan = make_plan(checkpoint, bits, sensitivity=losses)
                row[f"{name}_{kind}"] = kl(dropbydrop.view(model, plan=plan))
                row[f"{name}_{kind}_bits"] = round(plan.average_bits(checkpoint), 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
