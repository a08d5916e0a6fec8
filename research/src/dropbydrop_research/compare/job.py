"""A comparison that was asked for, checked before any work; and what its shared work depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dropbydrop.data.calibration import Calibration, file_of, load_windows
from dropbydrop.data.text_files import text_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.input_groups import codable
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import Source, resolve
from dropbydrop.quantization.config import SEQ_LEN
from dropbydrop.quantization.job import check_model
from dropbydrop.system.accelerator import pick_device
from dropbydrop.system.digest import digest, model_digest
from dropbydrop.system.errors import CalibrationError, DropError
from dropbydrop.system.memory import map_large_allocations
from dropbydrop_research.baselines import Method, ModelShape, choose
from dropbydrop_research.sources import files_of

from .config import CompareConfig

# what the Gram matrices depend on
_STATISTICS = ("models", "data", "system/accelerator.py", "system/distributed.py")
_LATER = ("methods", "blocks", "seq-len", "windows", "preset")  # options that may change


@dataclass(frozen=True)
class Job:
    """What to compare.

    Attributes:
        config: the settings; source, runner: the original model.
        blocks: how many of the first decoder blocks are quantized.
        ids, described: evaluation windows [n, T] and where they come from.
    """

    config: CompareConfig
    source: Source
    runner: BlockRunner
    methods: list[Method]
    blocks: int
    ids: Tensor
    described: dict[str, Any]

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of the comparison, ascending."""
        return self.config.levels

    @cached_property
    def shape(self) -> ModelShape:
        """What methods may know of the model beside its matrices."""
        runner = self.runner
        text = runner.model.config.get_text_config()
        heads = int(getattr(text, "num_attention_heads", None) or 1)
        linears = {
            name: linear
            for i, block in enumerate(runner.blocks)
            for name, linear in codable(block, runner.block_prefix(i)).items()
        }
        return ModelShape(
            str(text.model_type).removesuffix("_text"),
            runner.num_blocks,
            runner.blocks_name,
            heads,
            int(getattr(text, "num_key_value_heads", None) or heads),
            tuple((name, (m.out_features, m.in_features)) for name, m in linears.items()),
        )

    def calibration(self) -> Calibration:
        """The calibration windows, as `quantize` draws them.

        Raises:
            CalibrationError: missing, unreadable or too short a text.
        """
        context = context_length(self.runner.model.config) or SEQ_LEN
        return load_windows(
            self.config.calibration,
            self.source.tokenizer(),
            self.config.calibration_windows,
            min(SEQ_LEN, context),
            self.config.seed,
            source=self.source,
        )


def prepare(model: str, text: Path, config: CompareConfig | None = None) -> Job:
    """Check a request and open the model.

    Args:
        model: Hugging Face folder, .gguf file, hub id, or "smollm2".
        text: what to evaluate on.
        config: the settings; None: the default ones.

    Raises:
        DropError: unknown methods, levels, blocks, a text that is too short, an unsupported model.
    """
    config = config or CompareConfig()
    map_large_allocations()
    methods = choose(config.methods, config.levels)
    source = resolve(model)
    runner = BlockRunner.open(source.folder, device=pick_device(config.device))
    check_model(runner, 16)
    blocks = runner.num_blocks if config.blocks is None else config.blocks
    if not 1 <= blocks <= runner.num_blocks:
        raise DropError(f"--blocks {blocks}: this model has 1 to {runner.num_blocks} blocks.")
    ids, described = text_windows(text, source.tokenizer(), config.seq_len, config.windows)
    context = context_length(runner.model.config)
    if context is not None and config.seq_len > context:
        raise CalibrationError(
            f"--seq-len {config.seq_len} is longer than the model's context of {context} tokens."
        )
    return Job(config, source, runner, methods, blocks, ids, described)


def fingerprint(job: Job) -> dict[str, Any]:
    """What all methods depend on, by the names of the options."""
    shared = {k: v for k, v in job.config.by_option().items() if k not in _LATER}
    file = file_of(job.config.calibration)
    return shared | {
        "model": model_digest(job.source.folder),
        "calibration": [job.config.calibration] if file is None else [file.name, digest(file)],
        "device": str(job.runner.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "statistics": digest(*files_of(*_STATISTICS)),
    }
