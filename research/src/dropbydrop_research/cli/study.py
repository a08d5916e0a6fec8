"""`dropbydrop study …`: the theory as a tool. What each study shows is in docs/studies.md.

With --out DIR a study writes `<study>.json` and its plots as PNG and SVG there; matplotlib is asked
for before the work starts. Progress is on stderr.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.cli.options import Json, console, finish, parse_bits
from dropbydrop.system.errors import DropError, FormatError, PrecisionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.models.sources import Source
    from dropbydrop_research.study.cache import GramOptions
    from dropbydrop_research.study.data import GramFolder, Progress

MAX_LEVEL = 8

Model = Annotated[str, typer.Argument(help="Hugging Face folder, .gguf file, hub id, or smollm2.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for plots (PNG, SVG) and the JSON behind them.")
]
Calibration = Annotated[
    str | None, typer.Option(help="Text for H, or self: text that the model writes.")
]
HeldOut = Annotated[str | None, typer.Option(help="Held-out text (default: unused windows).")]
Windows = Annotated[int | None, typer.Option(help="Number of calibration windows (64).")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of a window (1024).")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of calibration and rotation (0).", min=0, max=(1 << 32) - 1)
]
Cache = Annotated[Path | None, typer.Option(help="Folder of cached Gram matrices.")]
Top = Annotated[int, typer.Option(help="Number of rows of ranked tables.")]
Levels = Annotated[str, typer.Option(help="Supervised levels of the nested code.")]
Preset = Annotated[str, typer.Option(help="Search effort: fast, balanced or best.")]
Width = Annotated[
    int,
    typer.Option(help="Inputs and rows of the synthetic matrix, d_in = d_out.", min=16, max=8192),
]


def register(app: typer.Typer) -> None:
    """Add the command family to the application."""
    family = typer.Typer(no_args_is_help=True, help="Measure what the theory says about a model.")
    family.command("gaussian")(gaussian)
    family.command("bound")(bound)
    family.command("refinement")(refinement)
    family.command("paper")(paper)
    app.add_typer(family, name="study")


def gaussian(
    model: Model,
    out: Out = None,
    calibration: Calibration = None,
    windows: Windows = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    cache: Cache = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """How Gaussian the weights are, before and after rotation (Figures 3 and 9)."""
    from dropbydrop.models.sources import resolve
    from dropbydrop_research.study import gaussian as study
    from dropbydrop_research.study import tables
    from dropbydrop_research.study.cache import find_grams

    _prepare(out)
    source = resolve(model)
    if calibration is None:
        grams = find_grams(source.folder, cache)
    else:
        options = _statistics(calibration, None, windows, seq_len, seed)
        grams = _grams(source, options, cache)
    with _reporting("fit") as progress:
        result = study.run(source.folder, seed=seed or 0, grams=grams, progress=progress)
    result["model"] = source.name
    tables.print_gaussian(result, console(as_json), top)
    figures = {
        "figure-3": study.plot_histograms,
        "figure-9": lambda r: study.plot_histograms(r, "rotated_rows"),
        "figure-9b": study.plot_effects,
    }
    _write(out, "gaussian", result, figures)
    finish(as_json, result)


def bound(
    model: Annotated[str, typer.Argument(help="A model, or a checkpoint folder.")],
    bits: Annotated[
        str | None, typer.Option(help="Levels (1,2,3,4; of a checkpoint, those it has).")
    ] = None,
    original: Annotated[
        str | None,
        typer.Option("--model", help="Original of a checkpoint (as it says)."),
    ] = None,
    out: Out = None,
    calibration: Calibration = None,
    held_out: HeldOut = None,
    windows: Windows = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    cache: Cache = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Each matrix against its Gaussian rate-distortion bound: what is left to gain.

    A bound for the ensemble, not for the one matrix; the premises that fail are listed.
    """
    from dropbydrop_research.study import bound_plots, tables

    _prepare(out)
    levels = None if bits is None else _levels(bits)
    options = (calibration, held_out, windows, seq_len, seed)
    result = _bound(model, original, levels, options, cache)
    tables.print_bound(result, console(as_json), top)
    figures: dict[str, Callable[[Any], Figure]] = {"bound": bound_plots.plot_gap}
    for level in result["rates"]:
        figures[f"bound-{level}"] = partial(bound_plots.plot_matrices, level=level)
    _write(out, "bound", result, figures)
    finish(as_json, result)


def refinement(
    levels: Levels = "2,3,4",
    width: Width = 256,
    preset: Preset = "balanced",
    seed: Seed = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Theorem 1 as an experiment on synthetic sources (Figures 4, 10, 11, 12)."""
    from dropbydrop_research.study import refinement_plots as plots
    from dropbydrop_research.study import tables

    _prepare(out)
    result = _refinement(levels, width, preset, seed)
    tables.print_refinement(result, console(as_json))
    figures = {
        "figure-4": plots.plot_equivalence,
        "figure-10": plots.plot_water_filling,
        "figure-11": plots.plot_levels,
        "figure-12": plots.plot_rate_distortion,
    }
    _write(out, "refinement", result, figures)
    finish(as_json, result)


def paper(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the page, plots and data.")] = Path("paper"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="Quantized from MODEL, for the distance from the bound.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Saved --json lines of quantize and eval (repeat), for Figures 6 to 8."),
    ] = None,
    levels: Levels = "2,3,4",
    calibration: Calibration = None,
    held_out: HeldOut = None,
    windows: Windows = None,
    seq_len: SeqLen = None,
    width: Width = 256,
    preset: Preset = "balanced",
    seed: Seed = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """All studies of MODEL, and one HTML page with the paper's figures as far as measured."""
    from dropbydrop.models.sources import resolve
    from dropbydrop_research.study import gaussian as gaussian_study
    from dropbydrop_research.study import paper as study
    from dropbydrop_research.study.cache import find_grams
    from dropbydrop_research.study.rows import read_results

    _prepare(out)
    rows = read_results(results or [])
    source = resolve(model)
    options = (calibration, held_out, windows, seq_len, seed)
    if checkpoint is None:
        limits = _bound(model, None, None, options, cache)
    else:
        limits = _bound(str(checkpoint), model, None, options, cache)
    with _reporting("fit") as progress:
        fits = gaussian_study.run(
            source.folder,
            seed=seed or 0,
            grams=find_grams(source.folder, cache),
            progress=progress,
        )
    fits["model"] = source.name
    measured = {
        "gaussian": fits,
        "bound": limits,
        "refinement": _refinement(levels, width, preset, seed),
        **rows,
    }
    report = study.run(measured, out, title=f"Drop-by-Drop: {source.name}")
    shown = console(as_json)
    shown.print(f"{len(report['figures'])} figures in {report['page']}")
    for name, command in report["missing"].items():
        shown.print(f"figure {name} is missing: give --results with the output of {command} --json")
    finish(as_json, report)


# ---- shared parts -----------------------------------------------------------------------------


@contextmanager
def _reporting(what: str) -> Iterator[Progress]:
    """A progress bar in the form that the studies report to."""
    from dropbydrop.system.console import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int, at: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {at}".strip())

        yield report


def _prepare(out: Path | None) -> None:
    """Find out that plots cannot be drawn or written before the work, not after it."""
    from dropbydrop_research.study.style import require_matplotlib

    if out is None:
        return
    require_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DropError(f"{out} cannot be a folder for plots ({error.strerror}).") from error


def _write(
    out: Path | None,
    name: str,
    result: Mapping[str, Any],
    figures: Mapping[str, Callable[[Any], Figure]],
) -> None:
    from dropbydrop_research.study.style import save

    if out is None:
        return
    (out / f"{name}.json").write_text(json.dumps(result, allow_nan=False) + "\n")
    for stem, draw in figures.items():
        save(draw(result), out / stem)


def _levels(text: str) -> list[int]:
    """Increasing levels from 1 on."""
    levels = sorted(set(parse_bits(text)))
    if levels[0] < 1 or levels[-1] > MAX_LEVEL:
        raise PrecisionError(f"levels {text}: choose whole numbers from 1 to {MAX_LEVEL}.")
    return levels


def _statistics(
    calibration: str | None,
    held_out: str | None,
    windows: int | None,
    seq_len: int | None,
    seed: int | None,
    recorded: Mapping[str, Any] | None = None,
) -> GramOptions:
    """Options of the statistics; what is not given as `recorded` in a checkpoint, or default."""
    from dropbydrop_research.study.cache import GramOptions

    given: dict[str, Any] = {"calibration": calibration, "held_out": held_out}
    for name, value in (("windows", windows), ("seq_len", seq_len), ("seed", seed)):
        known = value if value is not None else (recorded or {}).get(name)
        if known is not None and (type(known) is not int or not 0 <= known < 1 << 32):
            raise FormatError(
                f"the checkpoint's provenance says {name} {known!r} of its calibration, which is "
                f"no number of them; give --{name.replace('_', '-')}."
            )
        given[name] = known
    return GramOptions(**{key: value for key, value in given.items() if value is not None})


def _grams(source: Source, options: GramOptions, cache: Path | None) -> GramFolder:
    from dropbydrop_research.study.cache import grams_for

    with _reporting("inputs") as progress:
        return grams_for(source, options, cache, progress)


def _bound(
    model: str,
    original: str | None,
    levels: list[int] | None,
    given: tuple[str | None, str | None, int | None, int | None, int | None],
    cache: Path | None,
) -> dict[str, Any]:
    """The bound study of a model at nominal rates, or of a checkpoint at its true ones."""
    from dropbydrop.checkpoint.files import is_checkpoint
    from dropbydrop.models.sources import resolve
    from dropbydrop_research.study import bound as study
    from dropbydrop_research.study.checkpoint import checked_original, rates_of, reconstruction

    reconstruct, structural = None, "dedicated"
    recorded: Mapping[str, Any] = {}
    if is_checkpoint(Path(model)):
        from dropbydrop.checkpoint import Checkpoint

        checkpoint: Checkpoint = Checkpoint.open(model)
        rates = rates_of(checkpoint, levels)
        source = checked_original(checkpoint, original)
        recorded = checkpoint.quantization.provenance.get("calibration", {})
        if not isinstance(recorded, Mapping):
            raise FormatError(f"{model}: the calibration in its provenance is no object: damaged.")
        reconstruct = reconstruction(checkpoint.path, list(rates))
        structural = "trellis" if checkpoint.quantization.kind == "trellis" else structural
        name = checkpoint.path.name
    elif original is not None:
        raise DropError(f"--model given, but {model} is not a dropbydrop checkpoint.")
    else:
        source = resolve(model)
        rates = {p: float(p) for p in levels or (1, 2, 3, 4)}
        name = source.name
    grams = _grams(source, _statistics(*given, recorded), cache)
    with _reporting("bound") as progress:
        result = study.run(
            source.folder,
            grams,
            rates,
            reconstruct=reconstruct,
            structural=structural,
            progress=progress,
        )
    return result | {"model": name}


def _refinement(levels: str, width: int, preset: str, seed: int | None) -> dict[str, Any]:
    from dropbydrop.coding.codebooks import universal_set
    from dropbydrop.coding.encoder import EFFORTS
    from dropbydrop_research.study import refinement as study
    from dropbydrop_research.study.encode import overhead, package_encoder

    chosen = _levels(levels)
    if preset not in EFFORTS:
        raise DropError(f"--preset {preset!r} is not known; choose from {', '.join(EFFORTS)}.")
    if width < 16 or width % 8:
        raise DropError(f"--width {width}: give a multiple of 8, at least 16.")
    sets = list(dict.fromkeys([tuple(chosen), *((p,) for p in chosen)]))
    with _reporting("codebooks") as progress:
        for i, wanted in enumerate(sets):
            progress(i, len(sets), f"for {'-'.join(map(str, wanted))} bits")
            universal_set(wanted)
        progress(len(sets), len(sets), "")
    with _reporting("refinement") as progress:
        return study.run(
            package_encoder(preset, seed or 0),
            levels=chosen,
            d_in=width,
            d_out=width,
            overhead=overhead(width),
            seed=seed or 0,
            progress=progress,
        )
