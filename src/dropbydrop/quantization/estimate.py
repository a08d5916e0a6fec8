"""What a run will take, before it starts: time, peak memory, disk. Within 30 %, meant for planning.

Disk follows from shapes. Blocks of a model are alike, so the first is timed and the rest
extrapolated by their weights:

    calibrate    a text is read and cut for real; writing one is timed by its module
    gradients    a batch through block 0 and the head, forward and back
    activations  `collect_statistics` on one batch of windows and on two: cost of a batch, and the
                 constant part (loading, mirroring the Gram matrices)
    encode       for each input group, `encode_group` with its real Gram matrix and rows of its
                 largest matrix, some and three times as many: cost of a row, which does not depend
                 on the others, and the constant part (factoring H, cubic in d_in)
    write        a stretch of bytes written, hashed and synced beside OUT
    tune         block 0 with random codes, forward and back (tuning/cost.py); its text as above.
                 Where preset `best` leaves it out for want of a GPU, it is timed and told apart

Memory is the largest of several peaks, each measured on the timed part and completed by what that
had less of than the real run: the text; `collect_statistics`, plus the hidden states of all
windows; encoding an input group, plus these and the working copies of the rows that were not timed;
narrowing the embedding at the end.

Limits: block 0 stands for all. Times are those of now: a machine that is busy now, and not later,
deceives, and the estimate says so. Memory is that of a fresh process, as of the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropbydrop.checkpoint import CheckpointWriter
from dropbydrop.coding.codebooks import UNIVERSAL, default_lambdas
from dropbydrop.coding.encoder import encode_group, group_rotation, learn_group
from dropbydrop.coding.planes import counts_of
from dropbydrop.coding.rotation import split_odd
from dropbydrop.coding.tables import rings, table_bits
from dropbydrop.data.calibration import SELF
from dropbydrop.data.self_generated import Writing, writing_seconds
from dropbydrop.models.experts import routers, stack_names, weight_of
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.models.sources import side_files
from dropbydrop.models.statistics import BlockStatistics
from dropbydrop.models.token_gradients import TokenGradients
from dropbydrop.system.memory import peak_memory
from dropbydrop.system.paths import absolute

from .job import Job
from .tuning_cost import tuning_cost

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
        tuning, tuning_gib: seconds and peak memory of tuning; 0 where it is not looked at. They are
            in the figures above where it is done, else they are what `--tune` would take.
        untuned: why it is left out where it is done by default.
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
    tuning: float = 0.0
    tuning_gib: float = 0.0
    untuned: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        short = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}
        short["seconds"] = {k: round(v, 2) for k, v in self.seconds.items()}
        return {"dry_run": True, **short}

    def __str__(self) -> str:
        s = {phase: _duration(value) for phase, value in self.seconds.items()}
        tuned = f", tuning {s['tune']}" if "tune" in s else ""
        text = (
            f"about {s['total']} (calibration text {s['calibrate']}, gradients "
            f"{s['gradients']}, activations {s['activations']}, search {s['encode']}, writing "
            f"{s['write']}{tuned}); peak memory about {self.peak_gib:.2f} GiB; checkpoint "
            f"{self.bytes_out / 1e6:.1f} MB, at most {self.bytes_most / 1e6:.1f} MB on disk "
            f"while running, {self.bytes_free / 1e9:.1f} GB free"
        )
        if self.tuning and not tuned:
            text += (
                f". Without tuning, for want of a GPU: --tune would take about "
                f"{_duration(self.tuning)} more, and {self.tuning_gib:.2f} GiB"
            )
        if self.untuned:
            text += f". Without tuning: {self.untuned.removesuffix('.')}"
        if self.bytes_most > self.bytes_free:
            text += ". The disk is too small: free some space or choose another folder"
        if self.load > _BUSY:
            text += (
                f". The machine is busy (load {self.load:.1f} for each processor), and times are "
                "those of now; idle, it takes less"
            )
        return text


def estimate(
    job: Job, out: Path | str, *, overwrite: bool = False, resume: bool = False
) -> Estimate:
    """Estimate a run without starting it; nothing is left behind.

    Raises:
        DropError: what the run would refuse before its first block.
    """
    started, load = time.perf_counter(), _load()
    place, runner, config = absolute(out), job.runner, job.config
    CheckpointWriter(place, overwrite=overwrite).abort()  # whether OUT can be written at all
    first = FirstBlock(job)
    training, _ = _clock(job.universal)
    sizes, total, embedding = _sizes(job, first.input_groups)
    hidden = _hidden_bytes(job)
    written = 1.3 * total + (hidden * runner.num_blocks if resume else 0)  # 1.3: and reading back
    seconds = {
        "calibrate": first.calibrate,
        "gradients": first.gradients,
        "activations": first.activations,
        "encode": first.encode + training + first.tables,
        "write": _seconds_a_byte(place.parent) * written,
    }
    _reset_peak()
    tuning = tuning_cost(
        job, first.input_groups, first.like_it, total * _seconds_a_byte(place.parent)
    )
    seconds |= {"tune": tuning.seconds} if job.config.tune else {}
    tuning_peak = peak_memory() + tuning.missing if tuning.seconds else 0
    seconds["total"] = sum(seconds.values())
    # a raw file and its copy: of one plane, or of everything else
    most = total + max(*sizes, total - sum(sizes))
    if resume:  # raw files are kept to the end, and two generations of hidden states
        most = 2 * total + 2 * hidden
    if not job.unguided:  # the inputs of all blocks, until their gradients are known
        inputs = math.ceil(first.share * runner.num_blocks * hidden)
        most = max(most, hidden * (3 if resume else 1) + inputs)
    if job.config.tune:  # two checkpoints, and kept work
        most = max(most, 2 * total + (tuning.kept if resume else 0))
    _reset_peak()  # at the end the embedding is read and narrowed
    width = 10 if config.head_in_planes else 4 + config.head_bits // 8  # bytes a value
    peak = max(first.peak(), peak_memory() + width * embedding)
    return Estimate(
        seconds,
        max(peak, tuning_peak if job.config.tune else 0) / 2**30,
        total,
        most,
        shutil.disk_usage(place.parent).free,
        time.perf_counter() - started,
        load,
        tuning.seconds,
        tuning_peak / 2**30,
        job.untuned,
    )


def _clock(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


class FirstBlock:
    """Block 0, timed on one or two batches of windows and on some of its rows.

    Attributes:
        calibrate, gradients, activations, encode: seconds of the phases, of all blocks.
        like_it: the model, in blocks like the first.
        share: bytes of a state on its way to gradients, over those of the walk.
        tables: seconds to encode embedding and head, where they are in planes.
    """

    def __init__(self, job: Job) -> None:
        self.job, runner, config = job, job.runner, job.config
        _reset_peak()
        step = max(1, runner.batch_tokens // config.seq_len)
        ids = self._text()[: 2 * step]
        self._reading = peak_memory()
        _reset_peak()
        hidden = runner.embed(ids)
        self._held = hidden.numel() * hidden.element_size()
        loading, block = _clock(lambda: runner.block(0))

        def collect(x: Tensor) -> tuple[float, BlockStatistics]:
            return _clock(lambda: runner.collect_statistics(0, block, x))

        collect(hidden[:step])  # warms up
        one, _ = collect(hidden[:step])
        two, statistics = collect(hidden)
        ratio = ids.shape[0] / step  # 2, unless there is less than that
        batch = (two - one) / (ratio - 1) if ratio > 1.5 else one
        constant = loading + max(0.0, one - batch)
        self.input_groups = statistics.input_groups
        self._working = peak_memory()
        encode = sum(self._encode(block, statistics, g) for g in statistics.input_groups)
        weights = runner.linear_sizes()
        self.like_it = like_it = sum(weights) / weights[0]
        batches = job.windows_asked / step
        self.activations = like_it * (constant + batch * batches)
        self.gradients, self.share = 0.0, 0.0
        if not job.unguided:
            self._time_gradients(block, hidden[:step], like_it, loading, batches)
        self.encode = like_it * encode
        # every weight like one of the blocks: a table has a bit or two more
        self.tables = 0.0
        if config.head_in_planes:
            model = runner.model
            names = {*runner.embedding_modules, *([] if runner.tied else runner.head_modules)}
            values = sum(model.get_parameter(f"{name}.weight").numel() for name in names)
            self.tables = encode * values / weights[0]
        runner.release(0)

    def _time_gradients(
        self, block: nn.Module, x: Tensor, like_it: float, loading: float, batches: float
    ) -> None:
        """What weights of tokens take (guidance.py), from one batch x [b, T, D] of block 0."""
        gradients = TokenGradients(self.job.runner, self.job.config.seed)
        gradients.forward(0, x)  # warms up
        _reset_peak()
        forth, y = _clock(lambda: gradients.forward(0, x))
        head, back = _clock(lambda: gradients.head(y, 0))
        through, _ = _clock(lambda: gradients.block(0, block, x, back))
        self.gradients = like_it * (2 * loading + batches * (forth + through)) + batches * head
        self.share = gradients.dtype.itemsize / x.element_size()
        # a gradient in the place of the state, and a block's input beside it
        beside = int(self.share * _hidden_bytes(self.job))
        self._working = max(self._working, peak_memory() + beside)

    def _text(self) -> Tensor:
        """Windows [n, T] to time on, and the seconds of all of them."""
        job, config = self.job, self.job.config
        if job.ready is not None:
            self.calibrate = 0.0
            return job.ready.ids
        if config.calibration != SELF:
            self.calibrate, text = _clock(job.windows)
            return text.ids
        self.calibrate = writing_seconds(
            job.source.folder, job.windows_asked, config.seq_len, Writing(), job.runner.device
        )
        vocab = job.runner.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab, (job.windows_asked, config.seq_len), generator=generator)

    def _encode(self, block: nn.Module, statistics: BlockStatistics, group: InputGroup) -> float:
        """Seconds to encode all matrices of an input group."""
        config, device = self.job.config, self.job.runner.device
        prefix = f"{self.job.runner.block_prefix(0)}."
        modules = [weight_of(block, name.removeprefix(prefix)).float() for name in group.modules]
        weights = [matrix for w in modules for matrix in (w if group.experts else [w])]
        largest, rows = max(weights, key=len), sum(len(w) for w in weights)
        few = min(_ROWS * torch.get_num_threads(), len(largest))
        many = min(3 * few, len(largest))
        gram, books = statistics.grams[group.name], self.job.universal().to(device)
        each = 1  # number of H
        if gram.dim() == 3:  # one for each expert, the rows of one at a time
            each, rows, gram = len(gram), len(largest), gram[0]
        rotation = group_rotation({"w": largest}, gram, seed=0)
        universal = config.codebooks == UNIVERSAL
        encoder: Any = encode_group if universal else learn_group
        settings = (default_lambdas(config.levels), self.job.effort, config.backend)

        def encode(count: int) -> float:
            part = {"w": largest[:count]}
            return _clock(lambda: encoder(part, gram, rotation, books, config.levels, *settings))[0]

        _reset_peak()
        encode(min(few, 16))  # warms up
        small = min(encode(few), encode(few))
        large = min(encode(many), encode(many))
        # Copies at a time: W rotated, all levels as prefixes and decoded, three for an error. To
        # learn a set, all matrices of the input group are held, with residuals and sources of each
        # level.
        together = len(largest) if universal else rows
        copies = (4 if universal else 6) + 2 * len(config.levels)
        missing = 4 * copies * (together - many) * group.d_in
        self._working = max(self._working, peak_memory() + missing)
        if many == few:
            return each * small * rows / few
        return each * (small + max(0.0, large - small) / (many - few) * (rows - few))

    def peak(self) -> int:
        """Bytes of the real run, up to its end."""
        # held twice: as input and as output, which the real run writes over its input
        return max(self._reading, self._working + _hidden_bytes(self.job) - 2 * self._held)


def _hidden_bytes(job: Job) -> int:
    """Hidden states of all windows."""
    width = int(job.runner.model.config.get_text_config().hidden_size)
    return 4 * job.windows_asked * job.config.seq_len * width


def _sizes(job: Job, groups: list[InputGroup]) -> tuple[list[int], int, int]:
    """Bytes of every plane and of the checkpoint, values of the largest embedding; from shapes.

    `groups` are those of one block.
    """
    runner, config, planes = job.runner, job.config, job.planes
    kept_linears = routers(runner.blocks)
    names = [n for n, m in runner.blocks.named_modules() if isinstance(m, nn.Linear)]
    names = [*(n for n in names if n not in kept_linears), *stack_names(runner.blocks)]
    shapes = [tuple(weight_of(runner.blocks, name).shape) for name in names]
    weights = sum(map(math.prod, shapes))
    modules = [*runner.embedding_modules, *([] if runner.tied else runner.head_modules)]
    outer = [runner.model.get_parameter(f"{module}.weight") for module in modules]
    everything = sum(p.numel() for p in runner.model.parameters())
    kept = everything - weights - sum(p.numel() for p in outer)
    sizes = [sum(p.nbytes(*shape) for shape in shapes) for p in planes]
    total = sum(sizes) + 2 * sum(math.prod(shape[:-1]) for shape in shapes) + 4 * max(0, kept)
    total += runner.num_blocks * sum(g.d_in for g in groups)  # input scales
    total += sum(4 * odd * odd for odd in {split_odd(g.d_in)[1] for g in groups})
    sets = (
        1 if config.codebooks == UNIVERSAL and not config.tune else runner.num_blocks * len(groups)
    )
    total += sets * sum(plane.codebook_bytes + 130 for plane in planes)
    for table in outer:
        each, rest = _table_sizes(job, tuple(table.shape))
        sizes = [size + more for size, more in zip(sizes, each, strict=True)]
        total += sum(each) + rest
    # headers, log and config: about so many characters a tensor, matrix and input group
    total += (130 * (len(planes) + 1) + 300) * len(shapes) + 250 * runner.num_blocks * len(groups)
    total += sum(file.stat().st_size for file in side_files(job.source.folder))
    return sizes, total, max(p.numel() for p in outer)


def _table_sizes(job: Job, shape: tuple[int, ...]) -> tuple[list[int], int]:
    """Bytes of an embedding or head in every plane file, and in model.safetensors."""
    config, (vocab, d) = job.config, shape
    each = [0] * len(job.planes)
    if not config.head_in_planes:
        return each, vocab * d + 2 * vocab if config.head_bits == 8 else 2 * vocab * d
    bits = table_bits(config.levels, config.head_bits)
    count, length = rings(vocab)
    ends = counts_of(job.planes, config.levels)
    for end, low, high in zip(ends, (0, *bits), bits, strict=False):
        each[end - 1] += (high - low) * count * length * d // 8
    return each, 2 * vocab + d


def _seconds_a_byte(folder: Path) -> float:
    """Time to write, hash and sync."""
    data = os.urandom(1 << 20)

    def write() -> None:
        digest = hashlib.sha256()
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(_DISK_SAMPLE >> 20):
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())

    return _clock(write)[0] / _DISK_SAMPLE


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
