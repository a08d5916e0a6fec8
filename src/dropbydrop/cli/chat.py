"""`dropbydrop chat`: a conversation in the terminal, whose precision can change at every turn.

Answers go to stdout as they come; figures and remarks go to stderr, so that a pipe gets the answers
alone. With --json stdout has nothing but the last line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.system.errors import DropError, PrecisionError

from .options import CheckpointFolder, Json, finish

if TYPE_CHECKING:
    from dropbydrop.serve.conversation import Conversation, Turn

HELP = """\
/bits 2    answer at 2 bits from now on; also an average, such as 2.5
/reset     forget the conversation
/help      these lines
/quit      end, as Ctrl-D does; Ctrl-C ends an answer
"""


def run(
    out: CheckpointFolder,
    bits: Annotated[
        str | None, typer.Option(help="Level, or average such as 2.5, to begin with [the highest].")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Temperature; 0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """A conversation in the terminal; /bits 2 changes its precision."""
    from dropbydrop.models.sources import load_tokenizer
    from dropbydrop.runtime.generate import check_asked
    from dropbydrop.serve.conversation import Conversation
    from dropbydrop.serve.precisions import Precisions
    from dropbydrop.serve.sampling import Sampling
    from dropbydrop.serve.text import Text
    from dropbydrop.system.console import phase, quiet_transformers

    check_asked(max_new_tokens, temperature)
    chosen = None if bits is None else read_bits(bits)
    with phase("loading"), quiet_transformers():
        precisions = Precisions(out, None)
        sampling = Sampling(temperature=temperature, seed=seed)
        talk = Conversation(precisions, Text(load_tokenizer(out)), sampling, system)
        chosen = precisions.highest if chosen is None else chosen
        precisions.model(chosen)
    levels = ", ".join(map(str, precisions.levels))
    tell(f"levels {levels}; {chosen:g} bits now. /help shows the commands.")
    with quiet_transformers():
        turns = converse(talk, chosen, max_new_tokens, as_json)
    finish(as_json, {"levels": list(precisions.levels), "turns": turns, "messages": talk.messages})


def converse(talk: Conversation, bits: float, most: int, quiet: bool) -> list[dict[str, Any]]:
    """Read lines until they end; the figures of all answers."""
    turns: list[dict[str, Any]] = []
    for line in lines():
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            break
        try:
            if word == "/bits":
                chosen = read_bits(rest)
                talk.precisions.model(chosen)
                bits = chosen
                tell(f"{bits:g} bits from now on")
            elif word == "/reset":
                talk.reset()
                tell("a new conversation")
            elif word.startswith("/"):
                sys.stderr.write(HELP)
            else:
                turn = answer(talk, line, bits, most, quiet)
                turns.append({**asdict(turn), "tokens_per_second": turn.tokens_per_second})
        except DropError as error:  # the conversation goes on
            tell(f"error: {error}")
    return turns


def answer(talk: Conversation, message: str, bits: float, most: int, quiet: bool) -> Turn:
    """One answer, written as it comes; Ctrl-C ends it and keeps what there is."""
    from dropbydrop.system.console import printable

    target = sys.stderr if quiet else sys.stdout
    with closing(talk.answer(message, bits, most)) as pieces:  # type: ignore[type-var]
        try:
            for piece in pieces:
                target.write(printable(piece) if target.isatty() else piece)
                target.flush()
        except KeyboardInterrupt:
            pass
    target.write("\n")
    target.flush()
    turn = talk.turn
    assert turn is not None
    rate = turn.tokens_per_second
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    cut = {"length": ", cut at the limit", "interrupted": ", interrupted"}.get(turn.reason, "")
    read = turn.bytes_per_token / 1e6
    tell(f"{turn.bits:g} bits{speed}, {read:.1f} MB a token, {turn.tokens} tokens{cut}")
    return turn


def lines() -> Iterator[str]:
    """What the user types, or what is piped in; empty lines left out."""
    shown = sys.stdin.isatty()
    if shown:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  edits the line, and has those before
    while True:
        try:
            line = input("> ") if shown else sys.stdin.readline()
        except EOFError:
            return
        if not shown and not line:
            return
        if line.strip():
            yield line.strip()


def read_bits(text: str) -> float:
    """ "3" -> 3, "2.5" -> 2.5.

    Raises:
        PrecisionError: no number.
    """
    try:
        value = float(text)
        if not isfinite(value):
            raise ValueError
    except ValueError:
        raise PrecisionError(
            f"bits {text!r}: give a level, such as 3, or an average, such as 2.5."
        ) from None
    return int(value) if value.is_integer() else value


def tell(line: str) -> None:
    """A remark, set off from the answers: faint on a terminal."""
    from dropbydrop.system.console import printable

    faint, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    sys.stderr.write(f"{faint}{printable(line)}{plain}\n")
    sys.stderr.flush()
