"""Quantize a model into one nested checkpoint: the life-cycle around the encoder.

Steps:
    1. resolve the model, draw the calibration windows (written by the model itself by default);
    2. where the preset says so, weights of the tokens from gradients of the loss (guidance.py);
    3. block by block: load its weights, run the windows through it, collecting the Gram matrix of
       every input group and the block's output in one pass; encode its matrices; write them; free
       everything (encode_blocks.py). Activations are those of the unquantized model;
    4. write embedding and head, in planes under the H of the final norm's outputs or in 8 or 16
       bits, what stays as it is (norms and biases), config, log, model card, manifest; rename the
       folder into place;
    5. with `tune`, all that into a hidden place, and tuning from there into OUT (tuned.py).
In memory at a time: the hidden states of the windows, one block, its Gram matrices; with a GPU, in
the GPU's memory. Several processes (torchrun) share the windows and the matrices
(system/distributed.py).

Nothing is visible under OUT before the last step: bad input, an error, Ctrl-C or a full disk leave
no trace. With `resume`, finished blocks are kept beside OUT until it is there
(checkpoint/journal.py); the result has the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dropbydrop.checkpoint import CheckpointWriter, QuantizationConfig
from dropbydrop.checkpoint.config import CARD_FILE, LOG_FILE
from dropbydrop.checkpoint.journal import Journal
from dropbydrop.coding.codebook_set import set_of
from dropbydrop.coding.codebooks import UNIVERSAL
from dropbydrop.data.calibration import Calibration
from dropbydrop.models.head_statistics import head_gram
from dropbydrop.models.model_config import text_settings
from dropbydrop.models.sources import side_files
from dropbydrop.models.weight_checks import dtype_of
from dropbydrop.system.accelerator import pick_device
from dropbydrop.system.console import phase, progress_bar
from dropbydrop.system.distributed import Partition, Ranks
from dropbydrop.system.errors import CalibrationError, DropError
from dropbydrop.system.memory import device_peak, peak_memory
from dropbydrop.system.paths import absolute
from dropbydrop.system.version import __version__
from dropbydrop.tuning.report import TuneReport

from .config import QuantizeConfig
from .encode_blocks import BlockEncoder
from .fingerprint import fingerprint
from .guidance import Guidance, JournalStore, LocalStore
from .job import Job, prepare
from .log import Report, RunLog
from .model_card import license_of, model_card
from .tuned import search_and_tune

_UNSAID = ("device", "backend", "tune")  # tuning says itself what it has done
_DONE = -1  # instead of a number of steps: nothing is left to do


def quantize(
    model: str | Path,
    out: str | Path,
    bits: Sequence[int] | None = None,
    *,
    config: QuantizeConfig | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Report:
    """Quantize `model` once for all `bits`, and write the checkpoint folder `out`.

    Args:
        model: a local Hugging Face folder, a .gguf file, a hub id, or "smollm2".
        bits: levels that are supervised and can be asked for later; by default 2, 3 and 4.
        config: how, by default `QuantizeConfig()`.
        overwrite: replace an existing checkpoint, at the very end.
        resume: keep finished blocks in a hidden folder beside `out` until it is there, and go on
            from them if they are from the same command.
        options: fields of `QuantizeConfig` by name, in the place of those of `config`.
            `calibration` may also be ready windows: those of `data.calibration.load_windows`, which
            has more ways to make them, or the caller's.

    Returns:
        What was done; under torchrun only rank 0 has the books of all.

    Raises:
        DropError: anything about the input; nothing is left behind, or with `resume` only the
            finished blocks.
    """
    started = time.perf_counter()
    ready = options.get("calibration")
    if not isinstance(ready, str | Path | Calibration | None):
        raise CalibrationError(
            f"calibration is a {type(ready).__name__}: give a file, 'self', or ready windows as "
            "Calibration(ids, description)."
        )
    if isinstance(ready, Calibration):
        options["calibration"] = "ready windows"
    if bits is not None:
        options["levels"] = bits
    config = replace(config or QuantizeConfig(), **options)
    config = replace(config, device=pick_device(config.device))
    place = absolute(out)
    with Ranks.join(config.device) as ranks:
        if ranks.size > 1 and config.codebooks != UNIVERSAL:
            raise DropError(
                f"--codebooks {config.codebooks} with {ranks.size} processes: an input group's own "
                "codebooks are fitted to all its matrices together; run one process, or take the "
                "universal set."
            )
        job = ranks.on_all_ranks(
            lambda: prepare(model, config, ready=ready if isinstance(ready, Calibration) else None)
        )
        if not ranks.root:
            return _report(job, place, _carry_out(job, place, None, None, False, ranks), 0, started)
        if job.config.tune:  # one process
            search = partial(_carry_out, job, progress=progress, ranks=ranks)
            log, resumed, tuning = search_and_tune(job, place, overwrite, resume, progress, search)
            return _report(job, place, log, resumed, started, tuning)
        if not resume:
            with CheckpointWriter(place, overwrite=overwrite) as writer:
                log = _carry_out(job, place, writer, None, progress, ranks)
            return _report(job, place, log, 0, started)
        log, resumed = _resume(job, ranks, place, overwrite, progress)
        return _report(job, place, log, resumed, started)


def _resume(
    job: Job, ranks: Ranks, place: Path, overwrite: bool, progress: bool
) -> tuple[RunLog, int]:
    """The root's run with a journal; and how many blocks were there already."""
    with Journal(place, fingerprint(job)) as journal:
        resumed = sum("block" in step for step in journal.steps)
        if (published := journal.published()) is not None:
            ranks.broadcast(_DONE)
            log = RunLog(job.config.levels, unguided=job.unguided)
            log.restore([*(step["run"] for step in journal.steps), published["run"]])
            return log, resumed
        records = [step["writer"] for step in journal.steps]
        with CheckpointWriter(
            place, overwrite=overwrite, work=journal.path, records=records
        ) as writer:
            return _carry_out(job, place, writer, journal, progress, ranks), resumed


def _carry_out(
    job: Job,
    place: Path,
    writer: CheckpointWriter | None,
    journal: Journal | None,
    progress: bool,
    ranks: Ranks,
) -> RunLog:
    """Steps 1 to 4 of the module's note, from where the journal ends; the root has the writer."""
    runner = job.runner
    steps = ranks.broadcast(0 if journal is None else len(journal.steps))
    if steps == _DONE:  # the root found the checkpoint in place
        return RunLog(job.config.levels)
    kept = bool(ranks.broadcast(journal is not None))  # whether steps are kept for --resume
    mark = time.perf_counter()
    with phase("training codebooks", progress and not job.trained):
        stored = ranks.broadcast(
            ranks.on_all_ranks(lambda: job.universal().named() if ranks.root else None)
        )
    universal = set_of(job.planes, stored)
    trained = time.perf_counter() - mark  # a while, once a machine, if the set does not ship
    encoder = BlockEncoder(runner, writer, job.config, job.effort, universal, ranks)
    log = encoder.log
    log.seconds["encode"] += trained
    log.unguided = ranks.broadcast(job.unguided)
    if steps == 0:
        hidden, partition, calibration = _begin(job, encoder, journal, kept, progress)
    else:
        hidden, partition, calibration = _go_on(job, encoder, journal, steps)
    first, guidance = max(0, steps - 1), None
    if not log.unguided:
        store = JournalStore(journal, partition) if kept else LocalStore(place)
        guidance = Guidance(runner, partition, store, job.config.seed)
        hidden = _guide(guidance, first, hidden, journal, encoder, progress)
        first = max(0, first - guidance.steps)
    with progress_bar(progress) as bar:
        task = bar.add_task("quantize", total=runner.num_blocks, completed=first)
        for i in range(first, runner.num_blocks):
            assert hidden is not None
            with log.timed("activations"):
                block = runner.block(i)
                given = None if guidance is None else guidance.weights(i)
                statistics = runner.collect_statistics(
                    i, block, hidden, weights=given, out=hidden, partition=partition
                )
            with log.timed("encode"):
                encoder.encode_block(i, block, statistics)
                runner.release(i)
            del statistics
            more = kept and (i + 1 < runner.num_blocks or job.config.head_in_planes)
            _commit(journal, encoder, {"block": i}, partition.gather(hidden) if more else None)
            bar.advance(task)
    gram = None
    if job.config.head_in_planes:
        assert hidden is not None
        with log.timed("activations"):
            gram = head_gram(runner, hidden, partition)
    del hidden
    if ranks.root:
        with phase("writing the checkpoint", progress), log.timed("write"):
            _finish(job, encoder, calibration, journal, gram)
    return log


def _begin(
    job: Job, encoder: BlockEncoder, journal: Journal | None, kept: bool, progress: bool
) -> tuple[Tensor | None, Partition, dict[str, Any]]:
    """Step 1: this rank's hidden states [n, T, d], the partition, the text's description."""
    runner, ranks = job.runner, encoder.ranks
    with encoder.log.timed("calibrate"):
        text = ranks.on_all_ranks(lambda: job.windows(progress) if ranks.root else None)
        ids = ranks.broadcast(None if text is None else text.ids.cpu())
    partition = ranks.partition(runner.shards(*ids.shape))
    hidden = runner.embed(ids[partition.windows(ranks.rank)].to(runner.device))
    runner.release_outer()  # a large vocabulary takes more than the blocks; read again at the end
    calibration: dict[str, Any] = {}
    if text is not None:
        calibration = dict(text.description)
        if not encoder.learned:
            encoder.writer.add_codebook_set(UNIVERSAL, encoder.books.to("cpu"))
    _commit(
        journal, encoder, {"calibration": calibration}, partition.gather(hidden) if kept else None
    )
    return hidden, partition, calibration


def _go_on(
    job: Job, encoder: BlockEncoder, journal: Journal | None, steps: int
) -> tuple[Tensor | None, Partition, dict[str, Any]]:
    """What `_begin` returns, as the last finished step has left it."""
    runner, ranks = job.runner, encoder.ranks
    partition = ranks.partition(runner.shards(job.windows_asked, job.config.seq_len))
    calibration: dict[str, Any] = {}
    if journal is not None:
        encoder.log.restore([step["run"] for step in journal.steps])
        calibration = journal.steps[0]["calibration"]
    hidden: Tensor | None = None
    there = ranks.broadcast(journal is not None and "hidden" in journal.steps[-1])
    if there:
        whole = None if journal is None else journal.hidden()
        hidden = partition.scatter(whole).to(runner.device)
    return hidden, partition, calibration


def _guide(
    guidance: Guidance,
    done: int,
    hidden: Tensor | None,
    journal: Journal | None,
    encoder: BlockEncoder,
    progress: bool,
) -> Tensor | None:
    """The pass for gradients, from where the journal ends; the state before the first block."""
    if done >= guidance.steps:
        return hidden
    log, partition = encoder.log, guidance.partition
    with progress_bar(progress) as bar:
        task = bar.add_task("gradients", total=guidance.steps, completed=done)
        mark = time.perf_counter()

        def commit(step: dict[str, Any], state: Tensor | None) -> None:
            nonlocal mark
            log.seconds["gradients"] += time.perf_counter() - mark
            whole = state if guidance.kept else None
            _commit(journal, encoder, step, None if whole is None else partition.gather(whole))
            bar.advance(task)
            mark = time.perf_counter()

        return guidance.run(done, hidden, commit).to(guidance.runner.device)


def _commit(
    journal: Journal | None, encoder: BlockEncoder, step: dict[str, Any], hidden: Tensor | None
) -> None:
    """Finish a step, where steps are kept: what was written, the books, all hidden states."""
    if journal is not None:
        record = {"writer": encoder.writer.commit(), "run": encoder.log.mark()}
        journal.commit({**step, **record}, hidden)


def _finish(
    job: Job,
    encoder: BlockEncoder,
    calibration: dict[str, Any],
    journal: Journal | None,
    gram: Tensor | None,
) -> None:
    """Write what stays, config, log, model card and manifest; publish."""
    levels, log, folder = job.config.levels, encoder.log, job.source.folder
    job.runner.release_outer()  # what a block may have asked for again
    embeddings = encoder.write_rest(gram)
    provenance = {
        "base_model": job.source.name,
        **{k: v for k, v in job.config.to_dict().items() if k not in _UNSAID},
        "calibration": calibration,
        "lambdas": dict(zip(map(str, levels), encoder.lambdas, strict=True)),
        "token_weights": log.unguided or "gradients",
        "version": __version__,
    }
    quantization = QuantizationConfig(
        bits=levels[-1],
        levels=levels,
        planes=job.planes,
        input_groups=encoder.writer.input_groups,
        embeddings=embeddings,
        provenance=provenance,
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    if not config.get("dtype") and not config.get("torch_dtype"):  # as transformers reads it
        config["dtype"] = text_settings(config).get("dtype") or dtype_of(job.runner)
    files: dict[str, bytes | Path] = {file.name: file for file in side_files(folder)}
    files[LOG_FILE] = log.to_bytes()
    card = model_card(job.source.name, quantization, log.mean_errors(), license_of(folder))
    files[CARD_FILE] = card.encode()

    def announce(manifest: str) -> None:
        if journal is not None and not job.config.tune:  # else it is a stage that ends
            journal.publishing({"manifest": manifest, "run": log.mark()})

    encoder.writer.finish(config, quantization, files, log.parameters, announce)


def _report(
    job: Job,
    out: Path,
    log: RunLog,
    resumed: int,
    started: float,
    tuning: TuneReport | None = None,
) -> Report:
    device = job.runner.device
    tuned = {} if tuning is None else {"tune": tuning.seconds}
    return Report(
        out=out,
        levels=job.config.levels,
        seconds=log.seconds | tuned | {"total": time.perf_counter() - started},
        peak_gib=peak_memory() / 2**30,
        device_gib=device_peak(device) / 2**30,
        model_gib=4 * log.parameters / 2**30,
        errors=log.mean_errors(),
        matrices=len(log.matrices),
        kept=log.kept,
        unguided=log.unguided,
        backend=str(job.config.backend),
        resumed=resumed,
        log=log.matrices,
        tuning=tuning,
        untuned=job.untuned,
    )
