"""Quantize a model into one nested checkpoint: the life-cycle around the encoder.

Steps:
    1. resolve the model, draw the calibration windows (written by the model itself by default);
    2. block by block: load its weights, run the windows through it, collecting the Gram matrix of
       every input group and the block's output in one pass; encode its matrices; write them; free
       everything. Activations are those of the unquantized model;
    3. write what stays (embeddings and head in 8 or 16 bits, norms and biases as they are),
       config, log, model card, manifest; rename the folder into place.
In memory at a time: the hidden states of the windows, one block, its Gram matrices; with a GPU, in
the GPU's memory. Several processes (torchrun) share the windows and the matrices (distributed.py).

Nothing is visible under OUT before the last step: bad input, an error, Ctrl-C or a full disk leave
no trace. With `resume`, finished blocks are kept beside OUT until it is there (resume.py); the
result has the same bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dropbydrop.checkpoint import CheckpointWriter, PlaneSpec, QuantizationConfig
from dropbydrop.checkpoint.config import CARD_FILE, LOG_FILE
from dropbydrop.checkpoint.journal import Journal
from dropbydrop.coding.codebooks import UNIVERSAL, universal_set
from dropbydrop.coding.search import backends
from dropbydrop.data.calibration import SELF, Calibration, load_windows
from dropbydrop.errors import DropError
from dropbydrop.system.accelerator import pick_device
from dropbydrop.system.console import progress_bar
from dropbydrop.system.distributed import Ranks
from dropbydrop.system.memory import device_peak, peak_memory
from dropbydrop.system.version import __version__

from .config import SEQ_LEN, Job, check_levels, prepare
from .encode_blocks import Report, Run, Tally
from .fingerprint import fingerprint
from .report import model_card

__all__ = ["Job", "Report", "check_levels", "prepare", "quantize"]

_DONE = -1  # instead of a number of steps: nothing is left to do
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "NOTICE",
)


def quantize(
    model: str | Path,
    out: str | Path,
    bits: Sequence[int] = (2, 3, 4),
    *,
    calibration: str | Path | Calibration = SELF,
    preset: str = "balanced",
    codebooks: str = UNIVERSAL,
    seed: int = 0,
    head_bits: int = 8,
    windows: int | None = None,
    seq_len: int = SEQ_LEN,
    device: str = "auto",
    backend: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Report:
    """Quantize `model` once for all `bits`, and write the checkpoint folder `out`.

    Args:
        model: a local Hugging Face folder, a .gguf file, a hub id, or "smollm2".
        bits: the levels that are supervised and can be asked for later.
        calibration: a text or .jsonl file, "hub:DATASET[:SPLIT]" (hub_text.py), or "self": text
            that the model writes itself. From Python also ready windows, of `load_windows`, which
            has more ways to make them, or the caller's own.
        preset: "fast", "balanced" or "best": calibration tokens and search effort.
        codebooks: "universal", one set for everything, or "learned", one for each input group.
        head_bits: 8 (int8 rows) or 16, for embedding and head.
        windows, seq_len: calibration windows and their tokens; by default from the preset. Those of
            ready windows are what they are.
        device: where blocks run and matrices are encoded: "auto" (a CUDA device if there is one),
            "cpu", "cuda", "cuda:1". Under torchrun each process takes the one of its number.
        backend: search backend by name (see `search.backends`); by default the best here.
        overwrite: replace an existing checkpoint, at the very end.
        resume: keep finished blocks in a hidden folder beside `out` until it is there, and go on
            from them if they are from the same command (resume.py).

    Returns:
        What was done; under torchrun only rank 0 has the books of all.

    Raises:
        DropError: anything about the input; nothing is left behind, or with `resume` only the
            finished blocks.
    """
    started = time.perf_counter()
    device = pick_device(device)
    with Ranks.join(device) as ranks:
        if ranks.size > 1 and codebooks != UNIVERSAL:
            raise DropError(
                f"--codebooks {codebooks} with {ranks.size} processes: an input group's own "
                "codebooks are fitted to all its matrices together; run one process, or take the "
                "universal set."
            )
        job = ranks.on_all_ranks(
            lambda: prepare(
                model,
                bits,
                calibration=calibration,
                preset=preset,
                codebooks=codebooks,
                seed=seed,
                head_bits=head_bits,
                windows=windows,
                seq_len=seq_len,
                device=device,
                backend=backend,
            )
        )
        place = Path(os.path.abspath(out))
        if ranks.root:
            return _write(job, ranks, place, overwrite, resume, progress, started)
        return _report(job, place, _carry_out(job, None, None, False, ranks), 0, started)


def _write(
    job: Job,
    ranks: Ranks,
    place: Path,
    overwrite: bool,
    resume: bool,
    progress: bool,
    started: float,
) -> Report:
    """The root's part of `quantize`: everything that touches OUT."""
    if not resume:
        with CheckpointWriter(place, overwrite=overwrite) as writer:
            tally = _carry_out(job, writer, None, progress, ranks)
        return _report(job, place, tally, 0, started)
    with Journal(place, fingerprint(job)) as work:
        blocks = sum("block" in step for step in work.steps)
        if (record := work.published()) is not None:
            ranks.broadcast(_DONE)
            tally = Tally(job.levels)
            tally.restore([*(step["run"] for step in work.steps), record["run"]])
        else:
            records = [step["writer"] for step in work.steps]
            with CheckpointWriter(
                place, overwrite=overwrite, work=work.path, records=records
            ) as writer:
                tally = _carry_out(job, writer, work, progress, ranks)
    return _report(job, place, tally, blocks, started)


def _carry_out(
    job: Job, writer: CheckpointWriter | None, work: Journal | None, progress: bool, ranks: Ranks
) -> Tally:
    """Steps 1 to 3 of the module's note, from where `work` was left; the root has the writer."""
    runner = job.runner
    steps = ranks.broadcast(0 if work is None else len(work.steps))
    if steps == _DONE:  # the root found the checkpoint in place
        return Tally(job.levels)
    kept = bool(ranks.broadcast(work is not None))  # whether steps are kept for --resume
    mark = time.perf_counter()
    universal, learned = universal_set(job.levels), job.codebooks != UNIVERSAL
    trained = time.perf_counter() - mark  # a while, for levels whose set does not ship
    run = Run(
        runner, writer, job.levels, universal, job.effort, job.seed, job.backend, learned, ranks
    )
    tally, calibration = run.tally, {}
    tally.seconds["encode"] += trained
    hidden: Tensor | None = None
    if steps == 0:
        with tally.timed("calibrate"):
            text = ranks.on_all_ranks(lambda: _calibrate(job) if ranks.root else None)
            ids = ranks.broadcast(None if text is None else text.ids.cpu())
        partition = ranks.partition(runner.shards(*ids.shape))
        hidden = runner.embed(ids[partition.windows(ranks.rank)].to(runner.device))
        if text is not None:
            calibration = dict(text.description)
            if not learned:
                run.writer.add_codebook_set(UNIVERSAL, list(universal))
        _commit(work, run, {"calibration": calibration}, partition.gather(hidden) if kept else None)
        first = 0
    else:
        first, partition = steps - 1, ranks.partition(runner.shards(job.windows, job.seq_len))
        if work is not None:
            tally.restore([step["run"] for step in work.steps])
            calibration = work.steps[0]["calibration"]
        if first < runner.num_blocks:
            whole = None if work is None else work.hidden()
            hidden = partition.scatter(whole).to(runner.device)
    with progress_bar(progress) as bar:
        task = bar.add_task("quantize", total=runner.num_blocks, completed=first)
        for i in range(first, runner.num_blocks):
            assert hidden is not None
            with tally.timed("activations"):
                block = runner.block(i)
                statistics = runner.collect_statistics(
                    i, block, hidden, out=hidden, partition=partition
                )
            with tally.timed("encode"):
                run.encode_block(i, block, statistics)
                runner.release(i)
            del statistics
            more = kept and i + 1 < runner.num_blocks
            _commit(work, run, {"block": i}, partition.gather(hidden) if more else None)
            bar.advance(task)
    del hidden
    if ranks.root:
        with tally.timed("write"):
            _finish(job, run, calibration, work)
    return tally


def _calibrate(job: Job) -> Calibration:
    if isinstance(job.calibration, Calibration):
        return job.calibration
    return load_windows(
        job.calibration,
        job.source.tokenizer(),
        job.windows,
        job.seq_len,
        job.seed,
        source=job.source,
        device=job.runner.device,
    )


def _commit(work: Journal | None, run: Run, step: dict[str, Any], hidden: Tensor | None) -> None:
    """Finish a step, where steps are kept: what was written, the books, all hidden states."""
    if work is None:
        return
    work.commit({**step, "writer": run.writer.commit(), "run": run.tally.mark()}, hidden)


def _finish(job: Job, run: Run, calibration: dict[str, Any], work: Journal | None) -> None:
    """Write what stays, config, log, model card and manifest; publish."""
    levels, tally, folder = job.levels, run.tally, job.source.folder
    embeddings = run.write_rest(job.head_bits)
    provenance = {
        "base_model": job.source.name,
        "calibration": calibration,
        "preset": job.preset,
        "codebooks": job.codebooks,
        "seed": job.seed,
        "lambdas": dict(zip(map(str, levels), run.lambdas, strict=True)),
        "version": __version__,
    }
    quantization = QuantizationConfig(
        bits=levels[-1],
        levels=levels,
        planes=tuple(PlaneSpec() for _ in range(levels[-1])),
        input_groups=run.writer.input_groups,
        embeddings=embeddings,
        provenance=provenance,
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    files: dict[str, bytes | Path] = {
        name: folder / name for name in _COPIED if (folder / name).is_file()
    }
    files[LOG_FILE] = tally.log_lines()
    files[CARD_FILE] = model_card(job.source.name, quantization, tally.mean_errors()).encode()

    def announce(manifest: str) -> None:
        if work is not None:
            work.publishing({"manifest": manifest, "run": tally.mark()})

    run.writer.finish(config, quantization, files, {"total": tally.parameters}, announce)


def _report(job: Job, out: Path, tally: Tally, resumed: int, started: float) -> Report:
    return Report(
        out,
        job.levels,
        tally.seconds | {"total": time.perf_counter() - started},
        peak_memory() / 2**30,
        device_peak(job.runner.device) / 2**30,
        4 * tally.parameters / 2**30,
        tally.mean_errors(),
        len(tally.log),
        tally.kept,
        job.backend or backends(job.runner.device)[0],
        resumed,
        tally.log,
    )
