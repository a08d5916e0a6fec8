"""The command line. Each command parses, calls one function of the library, prints a table.

With --json the last line on stdout is one JSON object; tables and progress go to stderr.
User errors (errors.DropError) print their message and exit with status 2, Ctrl-C with 130. SIGTERM,
which schedulers send before they kill, ends a command as Ctrl-C does, except under torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.errors import CalibrationError, DropError

from . import bench as bench_command
from . import export as export_command
from . import plan as plan_command
from . import plugins
from . import transfer as transfer_command
from . import tune as tune_command
from .options import Bits, Json, console, finish, parse_bits, parse_dtype, parse_precision
from .tasks import BatchSize, Limit, Tasks, TasksData, evaluate_tasks

if TYPE_CHECKING:
    from dropbydrop.planning.precision import Precision

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # square brackets in help texts are text
    pretty_exceptions_enable=False,
    help="Quantize an LLM once, run it at any precision.",
)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, .gguf file, hub id, or smollm2.")
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to create.")],
    bits: Bits = "2,3,4",
    calibration: Annotated[
        str,
        typer.Option(help="Text or .jsonl file, hub:DATASET[:SPLIT], or self: the model's own."),
    ] = "self",
    preset: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    codebooks: Annotated[
        str, typer.Option(help="universal, or learned: a set for each input group.")
    ] = "universal",
    seed: Annotated[int, typer.Option(help="Of rotations and calibration.")] = 0,
    head_bits: Annotated[int, typer.Option(help="8 or 16, for embedding and head.")] = 8,
    windows: Annotated[
        int | None, typer.Option(help="Calibration windows [from the preset].")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 1024,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")
    ] = "auto",
    backend: Annotated[
        str | None, typer.Option(help="Search backend by name [the best here].")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished blocks; go on after an interruption.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate time, peak memory and disk.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL once for all levels, and write the checkpoint folder OUT."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.quantization import pipeline as life
    from dropbydrop.quantization.report import print_report
    from dropbydrop.system.distributed import rank_of_process

    order: dict[str, Any] = {
        "calibration": calibration,
        "preset": preset,
        "codebooks": codebooks,
        "seed": seed,
        "head_bits": head_bits,
        "windows": windows,
        "seq_len": seq_len,
        "device": device,
        "backend": backend,
    }
    if dry_run:
        from dropbydrop.quantization.estimate import dry_run as estimate

        job = life.prepare(model, parse_bits(bits), **order)
        expected = estimate(job, out, overwrite=overwrite, resume=resume)
        console(as_json).print(str(expected))
        return finish(as_json, expected.to_dict())
    try:
        report = life.quantize(
            model,
            out,
            parse_bits(bits),
            overwrite=overwrite,
            resume=resume,
            progress=rank_of_process() == 0,
            **order,
        )
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop}\n" if str(stop) else "")  # what --resume has kept
        raise
    if rank_of_process():  # under torchrun the first process speaks for all
        return
    checkpoint = Checkpoint.open(report.out)
    print_report(report, checkpoint, console(as_json))
    levels = {
        str(p): {
            "true_bits": checkpoint.true_bits(p),
            "true_bits_whole": checkpoint.true_bits_whole(p),
            "bytes": checkpoint.bytes_at(p),
        }
        for p in report.levels
    }
    finish(as_json, report.to_dict() | {"bits": levels})


@app.command()
def info(
    out: Annotated[Path | None, typer.Argument(help="Checkpoint folder.")] = None,
    verify: Annotated[bool, typer.Option(help="Read everything and compare the hashes.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="What runs on this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Levels, true bits, bytes and integrity of a checkpoint; or the kernels of this machine."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.coding.search import backends
    from dropbydrop.kernels import describe as describe_kernels
    from dropbydrop.kernels import table
    from dropbydrop.quantization.report import describe, print_info
    from dropbydrop.runtime.fused_decode import how_config

    out_console = console(as_json)
    result: dict[str, Any] = {}
    if kernels:
        result["search"] = backends()
        out_console.print(f"search backends, best first: {', '.join(result['search'])}")
        result["kernels"] = [asdict(kernel) for kernel in table()]
        out_console.print("inference kernels (* is in use):")
        for line in describe_kernels():
            out_console.print(line, markup=False, highlight=False)
        result["decoding"] = how_config(Checkpoint.open(out).config if out else None)
        out_console.print(f"decoding: {result['decoding']}", markup=False, highlight=False)
    if out is None:
        if not kernels:
            raise DropError("name a checkpoint folder, or ask for --kernels.")
        return finish(as_json, result)
    checkpoint = Checkpoint.open(out)
    result |= describe(checkpoint)
    print_info(result, out_console)
    findings = checkpoint.verify(hashes=verify)
    result["findings"] = [str(finding) for finding in findings]
    for finding in findings:
        out_console.print(f"[red]{finding}[/red]")
    if not findings:
        out_console.print(
            "all files present are intact" if verify else "sizes and headers are right"
        )
    finish(as_json, result)
    if findings:
        raise typer.Exit(2)


@app.command("eval")
def evaluate(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder; for --tasks any model.")],
    text: Annotated[Path | None, typer.Option(help="Text, .raw or .jsonl file.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="Levels, averages, plan files: 2,2.5,3 [all levels here].")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="How many windows [all].")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Original model, for KL and excess loss.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    tasks: Tasks = None,
    limit: Limit = None,
    tasks_data: TasksData = None,
    batch_size: BatchSize = 1,
    dtype: Annotated[str, typer.Option(help="Type to evaluate in.")] = "float32",
    as_json: Json = False,
) -> None:
    """Perplexity of each level, its divergence from the original model, zero-shot accuracy."""
    from dropbydrop.quantization.report import print_evaluation

    if text is None and tasks is None:
        raise DropError("name a --text to measure perplexity on, or zero-shot --tasks, or both.")
    chosen = None if bits is None else {part: parse_precision(part) for part in bits.split(",")}
    result: dict[str, Any] = {}
    if text is not None:
        result = run_evaluation(out, text, chosen, seq_len, windows, reference, seed, dtype)
        print_evaluation(result, console(as_json))
    if tasks is not None:
        shown = console(as_json)
        result["tasks"] = evaluate_tasks(
            out, tasks, chosen, reference, limit, tasks_data, shown, dtype, batch_size
        )
    finish(as_json, result)


def run_evaluation(
    out: Path,
    text: Path,
    chosen: Mapping[str, Precision] | None,
    seq_len: int,
    windows: int | None,
    reference: str | None,
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Evaluate views of one loaded checkpoint; the JSON object of `dropbydrop eval`.

    Args:
        chosen: name -> precision; by default all levels whose planes are here.

    Raises:
        DropError: text, levels, checkpoint or reference are not usable.
    """
    from transformers import AutoModelForCausalLM

    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.data.text_files import text_windows
    from dropbydrop.evaluation.perplexity import evaluate as run
    from dropbydrop.models.model_config import context_length
    from dropbydrop.models.sources import load_tokenizer, resolve
    from dropbydrop.runtime.load import load_views
    from dropbydrop.system.console import quiet_transformers

    checkpoint, kind = Checkpoint.open(out), parse_dtype(dtype)
    tokenizer = load_tokenizer(out)
    ids, described = text_windows(text, tokenizer, seq_len, windows)
    context = context_length(checkpoint.config)
    if context is not None and seq_len > context:
        raise CalibrationError(
            f"--seq-len {seq_len} is longer than the model's context of {context} tokens."
        )
    with quiet_transformers():
        loaded = load_views(checkpoint, chosen, kind)
        original = None
        if reference is not None:
            folder = resolve(reference).folder
            original = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
    views = {name: view for name, (_, view) in loaded.items()}
    result = run(views, original, ids, seed=seed)
    for name, (plan, _) in loaded.items():
        size = plan.bytes_read(checkpoint)
        result["bits"][name] |= {
            "true_bits": plan.true_bits(checkpoint),
            "true_bits_whole": 8 * size / checkpoint.manifest.total_parameters,
            "bytes": size,
        }
    return {**described, "dtype": dtype, **result}


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")],
    bits: Annotated[
        str | None, typer.Option(help="Level, average, or plan file [the highest level].")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 64,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    draft_bits: Annotated[
        str | None, typer.Option(help="Draft at this lower precision, verify at BITS.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt at one precision."""
    from dropbydrop import load, precision
    from dropbydrop.models.sources import load_tokenizer
    from dropbydrop.runtime.fused_decode import how
    from dropbydrop.runtime.generate import generate as run
    from dropbydrop.system.console import quiet_transformers

    with quiet_transformers():
        model = load(out) if bits is None else load(out, **vars(parse_precision(bits)))
        result = run(
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
        typer.echo(result.text)
    finish(as_json, {"bits": precision(model), "decoding": how(model), **asdict(result)})


bench_command.register(app)
export_command.register(app)
plan_command.register(app)
transfer_command.register(app)
tune_command.register(app)
plugins.register(app)


def _tell(error: DropError) -> None:
    """Print an error once, however many processes torchrun has started."""
    from dropbydrop.system.distributed import PeerError, rank_of_process

    rank = rank_of_process()
    if rank == 0 or not isinstance(error, PeerError):
        sys.stderr.write(f"error{f' of rank {rank}' if rank else ''}: {error}\n")


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the `dropbydrop` command."""
    if "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        status = app(standalone_mode=False)  # typer returns that of typer.Exit, and 130 for Ctrl-C
    except DropError as error:
        _tell(error)
        sys.exit(2)
    except Exception as error:
        usage = getattr(error, "show", None)  # click's usage errors
        if usage is None:
            raise
        usage()
        sys.exit(2)
    if status == 130:
        sys.stderr.write("interrupted; nothing was left half-written\n")
    if isinstance(status, int) and status:
        sys.exit(status)
