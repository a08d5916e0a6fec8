"""What a run will take, before it starts: time, peak memory, disk. Within 30 %, meant for planning.

Method. Blocks of a model are alike, so one is timed and the rest extrapolated by their weights:

    calibrate    a text is read and cut for real. `self`: the model is loaded, and one step is timed
                 with an empty, a half full and a full cache (Simpson's rule over the positions).
    activations  `collect_statistics` of block 0 on one batch of windows and on two: cost of a
    batch, and the
                 constant part (loading, mirroring the Gram matrices).
    encode       for each input group of block 0, `encode_group` with its real Gram matrix and rows
    of its
                 largest matrix, some and three times as many: cost of a row, and the constant part
                 (factoring H, cubic in d_in). The cost of a row does not depend on the others.
    write        a stretch of bytes written, hashed and synced beside OUT, and a slab of the
                 embedding narrowed. With --resume also the hidden states after each block.

Memory is the largest of several peaks, each measured on the timed part and completed by what that
had less of than the real run: reading or writing the text (the model in the type it writes in, and
its key/value cache); `collect_statistics`, with H of each input group held twice as two batches are
two lanes, plus the hidden states of all windows; encoding an input group, plus these and the
working copies of the rows that were not timed; narrowing the embedding at the end. Disk follows
from shapes.

Limits: block 0 stands for all. Times are those of now: a machine that is busy now, and not later,
deceives, and the estimate says so. Memory is that of a fresh process, as of the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropbydrop.checkpoint import CheckpointWriter
from dropbydrop.checkpoint.int8_rows import quantize_rows
from dropbydrop.coding.code import GROUP
from dropbydrop.coding.codebooks import HALF, UNIVERSAL, default_lambdas, universal_set
from dropbydrop.coding.encoder import encode_group, group_rotation
from dropbydrop.coding.learned_codebooks import learn_group
from dropbydrop.coding.rotation import split_odd
from dropbydrop.data.calibration import SELF, Calibration, load_windows
from dropbydrop.data.self_generated import Writing
from dropbydrop.models.statistics import BlockStatistics
from dropbydrop.system.memory import peak_memory

from .config import Job

_ROWS = 32  # rows a thread of the small search; three times as many of the large one
_DISK_SAMPLE = 32 << 20
_BUSY = 0.5  # load for each processor above which times are not those of an idle machine


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        seconds: by phase, and "total".
        peak_gib: peak memory of the process.
        bytes_out: size of the checkpoint. bytes_most: most disk in use at a time.
        bytes_free: free where OUT will be.
        spent: seconds that this estimate took.
        load: processes that wanted a processor before it began, for each processor (the average of
            a minute); 0 where the system does not tell.
    """

    seconds: dict[str, float]
    peak_gib: float
    bytes_out: int
    bytes_most: int
    bytes_free: int
    spent: float
    load: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "dry_run": True,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "peak_gib": round(self.peak_gib, 3),
            "bytes_out": self.bytes_out,
            "bytes_most": self.bytes_most,
            "bytes_free": self.bytes_free,
            "spent": round(self.spent, 2),
            "load": round(self.load, 2),
        }

    def __str__(self) -> str:
        s = self.seconds
        text = (
            f"about {_duration(s['total'])} (calibration text {_duration(s['calibrate'])}, "
            f"activations {_duration(s['activations'])}, search {_duration(s['encode'])}, writing "
            f"{_duration(s['write'])}); peak memory about {self.peak_gib:.2f} GiB; checkpoint "
            f"{self.bytes_out / 1e6:.1f} MB, at most {self.bytes_most / 1e6:.1f} MB on disk while "
            f"running, {self.bytes_free / 1e9:.1f} GB free"
        )
        if self.bytes_most > self.bytes_free:
            text += ". The disk is too small: free some space or choose another folder"
        if self.load > _BUSY:
            text += (
                f". The machine is busy (load {self.load:.1f} for each processor), and times are "
                "those of now; idle, it takes less"
            )
        return text


def dry_run(
    job: Job, out: Path | str, *, overwrite: bool = False, resume: bool = False
) -> Estimate:
    """Estimate a run without starting it; nothing is left behind.

    Raises:
        DropError: what the run would refuse before its first block.
    """
    started, load = time.perf_counter(), _load()
    place = Path(os.path.abspath(out))
    CheckpointWriter(place, overwrite=overwrite).abort()  # whether OUT can be written at all
    itself = _time_self(job) if str(job.calibration) == SELF else (0.0, 0)
    training, _ = _clock(lambda: universal_set(job.levels))
    block = _Block(job)
    shapes = _Shapes(job, block.input_groups)
    final = shapes.bytes_out()
    _reset_peak()
    generations = shapes.hidden_bytes() * job.runner.num_blocks if resume else 0
    writing = _write_seconds(job, place.parent, final, generations)
    at_the_end = peak_memory() + shapes.embedding * (1 if job.head_bits == 8 else 2)
    peak = max(block.peak(), itself[1], at_the_end)
    seconds = {"calibrate": block.text_seconds + itself[0], **block.seconds(), "write": writing}
    seconds["encode"] += training
    seconds["total"] = sum(seconds.values())
    # a raw file and its copy: of one plane, or of everything else
    most = final + max(shapes.plane_bytes(), final - job.levels[-1] * shapes.plane_bytes())
    if resume:  # raw files are kept to the end, and two generations of hidden states
        most = 2 * final + 2 * shapes.hidden_bytes()
    free = shutil.disk_usage(place.parent).free
    spent = time.perf_counter() - started
    return Estimate(seconds, peak / 2**30, final, most, free, spent, load)


def _clock(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


class _Block:
    """Block 0, timed on one or two batches of windows and on some of its rows."""

    def __init__(self, job: Job) -> None:
        self.job, runner = job, job.runner
        _reset_peak()
        step = max(1, runner.batch_tokens // job.seq_len)
        self.batches = job.windows / step
        self.text_seconds = 0.0
        spec = job.calibration
        if isinstance(spec, Calibration):
            ids = spec.ids[: 2 * step]
        elif str(spec) == SELF:
            vocab = runner.model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(0)
            count = min(job.windows, 2 * step)
            ids = torch.randint(0, vocab, (count, job.seq_len), generator=generator)
        else:
            self.text_seconds, text = _clock(
                lambda: load_windows(
                    spec, job.source.tokenizer(), job.windows, job.seq_len, job.seed
                )
            )
            ids = text.ids[: 2 * step]
        self.reading = peak_memory()
        _reset_peak()
        hidden = runner.embed(ids)
        self.held = hidden.numel() * hidden.element_size()
        loading, block = _clock(lambda: runner.block(0))
        self.block = block
        self._capture(hidden[:step])  # warms up
        one = self._capture(hidden[:step])[0]
        two, statistics = self._capture(hidden)
        ratio = ids.shape[0] / step  # 2, unless there is less than that
        self.batch = (two - one) / (ratio - 1) if ratio > 1.5 else one
        self.constant = loading + max(0.0, one - self.batch)
        self.statistics, self.input_groups = statistics, statistics.input_groups
        self.working = peak_memory()
        self.encode = sum(self._time_group(input_group) for input_group in statistics.input_groups)
        weights = runner.linear_sizes()
        self.blocks = sum(weights) / weights[0]  # in blocks like the first
        runner.release(0)
        del self.block, self.statistics

    def _capture(self, hidden: Tensor) -> tuple[float, BlockStatistics]:
        return _clock(lambda: self.job.runner.collect_statistics(0, self.block, hidden))

    def _time_group(self, input_group: Any) -> float:
        """Seconds to encode all matrices of an input group."""
        job, device = self.job, self.job.runner.device
        prefix = f"{job.runner.block_prefix(0)}."
        modules = [
            self.block.get_submodule(name.removeprefix(prefix)) for name in input_group.modules
        ]
        weights = [m.weight.detach().float() for m in modules]
        largest = max(weights, key=len)
        rows = sum(len(w) for w in weights)
        few = min(_ROWS * torch.get_num_threads(), len(largest))
        many = min(3 * few, len(largest))
        gram = self.statistics.grams[input_group.name]
        rotation = group_rotation({"w": largest}, gram, seed=0)
        codebooks = universal_set(job.levels).to(device)
        encoder: Any = encode_group if job.codebooks == UNIVERSAL else learn_group

        def encode(count: int) -> float:
            return _clock(
                lambda: encoder(
                    {"w": largest[:count]},
                    gram,
                    rotation,
                    codebooks,
                    job.levels,
                    default_lambdas(job.levels),
                    job.effort,
                    job.backend,
                )
            )[0]

        _reset_peak()
        encode(min(few, 16))  # warms up
        small = min(encode(few), encode(few))
        large = min(encode(many), encode(many))
        # Copies at a time: W rotated, all levels as prefixes and decoded, three for an error. To
        # learn a set, all matrices of the input group are held, with residuals and sources of each
        # level.
        together = len(largest) if job.codebooks == UNIVERSAL else rows
        copies = (4 if job.codebooks == UNIVERSAL else 6) + 2 * len(job.levels)
        missing = 4 * copies * (together - many) * input_group.d_in
        self.working = max(self.working, peak_memory() + missing)
        if many == few:
            return small * rows / few
        row = max(0.0, large - small) / (many - few)
        return small + row * (rows - few)

    def seconds(self) -> dict[str, float]:
        """Of all blocks."""
        one = self.constant + self.batch * self.batches
        return {"activations": self.blocks * one, "encode": self.blocks * self.encode}

    def peak(self) -> int:
        """Bytes of the real run's text and walk."""
        text = self.job.runner.model.config.get_text_config()
        full = 4 * self.job.windows * self.job.seq_len * text.hidden_size
        # held twice: as input and as output, which the real run writes over its input
        return max(self.reading, self.working + full - 2 * self.held)


class _Shapes:
    """Sizes that follow from the config."""

    def __init__(self, job: Job, input_groups: list[Any]) -> None:
        self.job, runner = job, job.runner
        linears = [m for b in runner.blocks for m in b.modules() if isinstance(m, nn.Linear)]
        self.weights = sum(m.in_features * m.out_features for m in linears)
        self.rows = sum(m.out_features for m in linears)
        self.inputs = runner.num_blocks * sum(input_group.d_in for input_group in input_groups)
        self.odd = sum(
            4 * odd * odd
            for odd in {split_odd(input_group.d_in)[1] for input_group in input_groups}
        )
        self.matrices = len(linears)
        self.input_groups = runner.num_blocks * len(input_groups)
        names = {f"{n}.weight" for n in (*runner.embedding_modules, *runner.head_modules)}
        self.outer = [p for n, p in runner.model.named_parameters() if n in names]
        self.embedding = max(p.numel() for p in self.outer)

    def bytes_out(self) -> int:
        """Size of the checkpoint folder."""
        job, runner = self.job, self.job.runner
        planes = job.levels[-1]
        outer = self.outer[:1] if runner.tied else self.outer
        embeddings = sum(
            p.numel() + 2 * p.shape[0] if job.head_bits == 8 else 2 * p.numel() for p in outer
        )
        everything = sum(p.numel() for p in runner.model.parameters())
        kept = everything - self.weights - sum(p.numel() for p in outer)
        size = planes * self.plane_bytes() + 2 * self.rows + self.inputs + self.odd
        sets = 1 if job.codebooks == UNIVERSAL else self.input_groups
        size += sets * planes * (2 * HALF * GROUP + 130)
        size += embeddings + 4 * max(0, kept)
        # headers, log and config: about so many characters a tensor, matrix and input group
        size += 130 * (planes + 1) * self.matrices + 300 * self.matrices + 250 * self.input_groups
        folder = job.source.folder
        side = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        return size + sum((folder / n).stat().st_size for n in side if (folder / n).is_file())

    def plane_bytes(self) -> int:
        """Codes of one plane."""
        return self.weights // GROUP

    def hidden_bytes(self) -> int:
        """One generation of hidden states."""
        text = self.job.runner.model.config.get_text_config()
        return 4 * self.job.windows * self.job.seq_len * int(text.hidden_size)


def _time_self(job: Job) -> tuple[float, int]:
    """Seconds and peak bytes of writing the calibration text."""
    from dropbydrop.data.self_generated import (
        batch_size,
        cache_with_room,
        draw,
        open_model,
        texts_of,
    )

    _reset_peak()
    model: Any
    loading, model = _clock(lambda: open_model(job.source.folder, job.runner.device))
    pieces, length = texts_of(job.seq_len, Writing())
    texts = job.windows * pieces
    size = batch_size(model, texts, length)
    cache: Any = cache_with_room(length)
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (size, 1)).to(model.device)

    @torch.inference_mode()
    def step(position: int) -> float:
        for layer in cache.layers:
            layer.seek(position)

        def run() -> None:
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            draw(logits, 1.0, generator).tolist()

        return _clock(run)[0]

    step(0)
    with torch.inference_mode():
        for layer in cache.layers:  # as resident as they will be
            layer.clear()
    first, middle, last = (
        sum(step(p) for _ in range(3)) / 3 for p in (0, length // 2, max(0, length - 1))
    )
    one = (first + 4 * middle + last) / 6
    seconds = loading + one * length * -(-texts // size)
    return seconds, peak_memory()


def _write_seconds(job: Job, parent: Path, final: int, generations: int) -> float:
    """Assembling and syncing the checkpoint (and `generations` bytes of hidden states), and
    narrowing the embedding."""
    data = os.urandom(1 << 20)

    def write() -> None:
        digest = hashlib.sha256()
        with tempfile.TemporaryFile(dir=parent) as file:
            for _ in range(_DISK_SAMPLE >> 20):
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())

    per_byte = _clock(write)[0] / _DISK_SAMPLE
    seconds = per_byte * (1.3 * final + generations)  # 1.3: and reading back
    runner = job.runner
    modules = [*runner.embedding_modules, *([] if runner.tied else runner.head_modules)]
    for module in modules:
        reading, weight = _clock(partial(runner.read, f"{module}.weight"))
        seconds += reading
        if job.head_bits == 8:
            slab = weight[:8192]
            seconds += _clock(partial(quantize_rows, slab))[0] * len(weight) / len(slab)
    return seconds


def _load() -> float:
    """Load average of the last minute for each processor."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def _reset_peak() -> None:
    """Have the kernel forget the peak so far (Linux; elsewhere the peaks of both parts merge)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
