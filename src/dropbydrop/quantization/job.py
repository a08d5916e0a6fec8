"""A request to quantize, opened and checked: what would fail later is refused here by name.

`prepare` opens the model and settles what the settings leave open: windows from the preset, a
window's length within the model's context, device and search backend. Nothing is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.codebooks import UNIVERSAL, file_of_set, universal_set
from dropbydrop.coding.encoder import EFFORTS, Effort
from dropbydrop.coding.kinds import backends
from dropbydrop.coding.planes import PlaneSpec, planes_of
from dropbydrop.data.calibration import SELF, Calibration, load_windows
from dropbydrop.data.text_files import check_tokens, sizes, tokenize
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.embeddings import embedded_tokens, output_scale
from dropbydrop.models.experts import stack_names, weight_of
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import Source, load_tokenizer, resolve, side_files
from dropbydrop.models.weight_checks import check_values, check_weights
from dropbydrop.system.accelerator import pick_device
from dropbydrop.system.distributed import rank_of_process
from dropbydrop.system.errors import (
    CalibrationError,
    DropError,
    FormatError,
    KernelError,
    UnsupportedModelError,
)
from dropbydrop.system.memory import map_large_allocations
from dropbydrop.tuning.config import TuneConfig
from dropbydrop.tuning.job import check_tunable, draw_windows

from .config import SEQ_LEN, WINDOWS, QuantizeConfig
from .trial import try_gradients, try_model

_SAMPLE = "One model, 1234 words: naïve façades — été, дом, 日本語!\n\tfor (i = 0; i < n; i++)"


@dataclass(frozen=True)
class Job:
    """What to quantize, and how.

    Attributes:
        config: complete settings: nothing in them is left open.
        effort: search effort of the preset.
        ready: windows that the caller made; None: they are drawn as `config.calibration` says.
        unguided: why tokens do not count by gradients of the loss; "" if they do. The root's.
        untuned: why no tuning follows where it would by default; "" if it does, or would not.
    """

    config: QuantizeConfig
    source: Source
    runner: BlockRunner
    effort: Effort
    ready: Calibration | None = None
    unguided: str = ""
    untuned: str = ""

    def windows(self, progress: bool = True) -> Calibration:
        """The calibration windows; `progress`: show how the model writes them.

        Raises:
            CalibrationError: missing, unreadable or too short a text.
        """
        config = self.config
        if self.ready is not None:
            return self.ready
        made = load_windows(
            config.calibration,
            self.source.tokenizer(),
            self.windows_asked,
            config.seq_len,
            config.seed,
            source=self.source,
            device=self.runner.device,
            progress=progress,
        )
        check_tokens(made.ids, embedded_tokens(self.runner.model))
        return made

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        """Those of the checkpoint."""
        if self.config.code == "trellis":
            return self.universal().planes  # a preset's window is the most, not what ships
        return planes_of(self.config.code, self.config.levels, 0)

    def universal(self) -> CodebookSet:
        """The universal set, which is trained first if need be."""
        return universal_set(self.config.levels, None, self.config.code, self.effort.window)

    @property
    def trained(self) -> bool:
        """Whether the universal set is there already."""
        return self.config.code == "trellis" or file_of_set(self.config.levels).is_file()

    def tuning(self) -> tuple[TuneConfig, Calibration | None]:
        """Settings of the tuning that follows, those of `tune` by default: text of the same source
        and seed. Of windows that the caller made, it takes the first ones.

        Raises:
            CalibrationError: a single window.
        """
        given = self.config
        config = TuneConfig(calibration=given.calibration, seed=given.seed, device=given.device)
        if self.ready is None:
            return config, None
        ids = self.ready.ids[: config.windows, : config.seq_len].contiguous()
        config = replace(config, windows=ids.shape[0], seq_len=ids.shape[1])
        return config, Calibration(ids, self.ready.description | sizes(ids))

    @property
    def windows_asked(self) -> int:
        """Number of calibration windows."""
        assert self.config.windows is not None, "`prepare` settles it"
        return self.config.windows


def prepare(model: str | Path, config: QuantizeConfig, *, ready: Calibration | None = None) -> Job:
    """Check a request and open its model.

    Large blocks of memory are mapped on their own from here on (`map_large_allocations`): a setting
    of the whole process, made because the caller asked for work of many gigabytes.

    Args:
        model: a local Hugging Face folder, a .gguf file, a hub id, or "smollm2".
        ready: windows int64 [n, T] in the place of those that `config` describes.

    Raises:
        DropError: what can be told before any work.
    """
    map_large_allocations()
    source = resolve(model)
    runner = BlockRunner.open(source.folder, device=pick_device(config.device))
    check_weights(runner)
    check_model(runner, config.head_bits)
    if config.codebooks != UNIVERSAL and stack_names(runner.blocks):
        raise UnsupportedModelError(
            f"--codebooks {config.codebooks} with a mixture of experts: a set is fitted to "
            "matrices that share one H, and experts have an H each. Leave --codebooks out."
        )
    longest = context_length(runner.model.config) or SEQ_LEN
    windows = config.windows or WINDOWS[config.preset]
    seq_len = min(config.seq_len, longest)
    if ready is not None:
        vocab = runner.model.config.get_text_config().vocab_size
        _check_windows(ready, config.windows, longest, vocab)
        windows, seq_len = ready.ids.shape
    complete = replace(
        config,
        windows=windows,
        seq_len=seq_len,
        device=str(runner.device),
        backend=_backend(config, runner.device),
    )
    job = Job(complete, source, runner, EFFORTS[config.preset], ready)
    if config.code == "trellis":
        job.universal()  # refuses levels that it does not have
    check_side_files(source, needed=ready is None)
    if rank_of_process() == 0:  # for all
        check_values(runner, config.head_bits)
        try_model(runner, complete, job.planes)
        return _settle_tuning(replace(job, unguided=_unguided(job)))
    return job


def _unguided(job: Job) -> str:
    """See `Job`."""
    return try_gradients(job.runner) if job.effort.guided else f"preset {job.config.preset}"


def _settle_tuning(job: Job) -> Job:
    """Whether tuning follows: where it was asked for, else with preset `best` on a GPU.

    Raises:
        DropError: it was asked for and cannot be done.
    """
    asked, untuned = job.config.tune, ""
    by_default = job.config.preset == "best" and job.runner.device.type == "cuda"
    wanted = by_default if asked is None else asked
    try:
        if wanted:
            check_tuning(job)
    except DropError as error:
        if asked:
            raise
        wanted, untuned = False, str(error)
    return replace(job, config=replace(job.config, tune=wanted or asked), untuned=untuned)


def check_tuning(job: Job) -> None:
    """Refuse by name, before the search, what tuning would refuse after it.

    Raises:
        DropError: experts, no gradients, several processes, too short a text.
    """
    check_tunable(job.runner)
    config, ready = job.tuning()
    if reason := job.unguided if job.effort.guided else try_gradients(job.runner):
        raise UnsupportedModelError(f"{reason}; tuning needs gradients. Leave it out: --no-tune.")
    if ready is None and config.calibration != SELF:
        try:
            draw_windows(config, job.source, job.runner)
        except CalibrationError as error:
            raise CalibrationError(
                f"tuning after the search, whose windows are its own: {error} Or leave it out: "
                "--no-tune."
            ) from error


def _backend(config: QuantizeConfig, device: torch.device) -> str:
    """The search backend, by name.

    Raises:
        KernelError: this machine does not have it.
    """
    names = backends(config.code, device)
    name = config.backend or names[0]
    if name not in names:
        raise KernelError(f"search backend {name!r} is not available here; choose one of {names}.")
    return name


def check_side_files(source: Source, needed: bool) -> None:
    """Refuse files that cannot be copied, and a tokenizer that the copies would not give.

    Args:
        needed: whether the tokenizer is needed.

    Raises:
        FormatError: unreadable, no tokenizer, or one that needs files that are not copied.
    """
    for file in side_files(source.folder):
        try:
            file.open("rb").close()
        except OSError as error:
            raise FormatError(
                f"{file} cannot be read ({error.strerror}), but belongs to the checkpoint. Make it "
                "readable, or move it away."
            ) from error
    try:
        first = source.tokenizer()
    except FormatError:
        if needed:
            raise
        return
    with tempfile.TemporaryDirectory(prefix="dropbydrop-") as name:
        for file in (source.folder / "config.json", *side_files(source.folder)):
            shutil.copyfile(file, Path(name) / file.name)
        try:
            same = _tokens(load_tokenizer(name)) == _tokens(first)
        except FormatError:
            same = False
    if not same:
        raise FormatError(
            f"the tokenizer of {source.folder} is another one without its other files (copied are "
            f"{', '.join(file.name for file in side_files(source.folder)) or 'none'}). Save it "
            "with transformers (AutoTokenizer.from_pretrained, save_pretrained), which writes "
            "tokenizer.json."
        )


def _tokens(tokenizer: Any) -> list[int]:
    return tokenize(_SAMPLE, tokenizer).tolist()


def _check_windows(ready: Calibration, windows: int | None, longest: int, vocab: int) -> None:
    """Refuse windows that this model cannot run, or another number than was asked for."""
    try:
        json.dumps(ready.description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"the description of the calibration windows cannot be stored as JSON ({error}); give "
            "a dictionary of texts and numbers."
        ) from error
    ids = ready.ids
    good = ids.ndim == 2 and ids.dtype == torch.int64 and ids.shape[0] > 0
    if not good or not 2 <= ids.shape[1] <= longest:
        raise CalibrationError(
            f"calibration windows {ids.dtype} of shape {list(ids.shape)}: give int64 [n, T], with "
            f"T from 2 to the {longest:,} tokens of the model's context."
        )
    if windows not in (None, ids.shape[0]):
        raise CalibrationError(f"{ids.shape[0]} ready windows, but {windows} are asked for.")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise CalibrationError(
            f"calibration windows with tokens from {int(ids.min())} to {int(ids.max())}, for a "
            f"vocabulary of {vocab:,}: they are another tokenizer's."
        )


def check_model(runner: BlockRunner, head_bits: int) -> None:
    """Refuse by name, before any work, what would fail later.

    Raises:
        UnsupportedModelError: an embedding that computes more than a look-up and shall have 8-bit
            rows.
    """
    for module in runner.embedding_modules:
        embedding = runner.model.get_submodule(module)
        if head_bits != 16 and output_scale(embedding) is None:
            raise UnsupportedModelError(
                f"{module} is a {type(embedding).__name__}, which may compute more than a look-up, "
                "so its rows cannot be coded; quantize this model with --head-bits 16."
            )
    blocks = runner.blocks
    for name in stack_names(blocks):
        if (inputs := weight_of(blocks, name).shape[-1]) % GROUP:
            raise UnsupportedModelError(
                f"{runner.blocks_name}.{name} has {inputs} inputs, which is not a multiple of "
                f"{GROUP}, and codes cover groups of {GROUP} inputs. This version cannot quantize "
                "this model."
            )
