"""`dropbydrop generate`: continue a prompt at one precision."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from .options import CheckpointFolder, Json, PlanFile, finish, parse_level, parse_precision


def run(
    out: CheckpointFolder,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    bits: Annotated[str | None, typer.Option(help="Level [the highest].")] = None,
    avg_bits: Annotated[
        float | None, typer.Option(help="Average bits a weight, instead of a level.")
    ] = None,
    plan: PlanFile = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="Temperature; 0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    draft_bits: Annotated[
        str | None,
        typer.Option(help="Lower level, average (2.5) or plan file that drafts."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt at one precision."""
    from dropbydrop.models.sources import load_tokenizer
    from dropbydrop.planning.plan import Plan
    from dropbydrop.runtime.fused_decode import how
    from dropbydrop.runtime.generate import generate
    from dropbydrop.runtime.load import load
    from dropbydrop.runtime.views import precision
    from dropbydrop.system.console import printable, quiet_transformers

    with quiet_transformers():
        chosen = None if plan is None else Plan.load(plan)
        model = load(out, parse_level(bits), avg_bits=avg_bits, plan=chosen)
        result = generate(
            model,
            load_tokenizer(out),
            prompt,
            max_new_tokens=max_new_tokens,
            chat=chat,
            temperature=temperature,
            seed=seed,
            draft=None if draft_bits is None else parse_precision(draft_bits),
        )
    if not as_json:
        typer.echo(printable(result.text) if sys.stdout.isatty() else result.text)
    finish(as_json, {"bits": precision(model), "decoding": how(model), **asdict(result)})
