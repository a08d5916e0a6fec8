"""`DropByDropConfig`: what vLLM asks about a checkpoint.

vLLM makes one from `quantization_config`, sends it to its workers, and asks there for the method of
every layer as it builds the model. The checkpoint is opened where it is read: an opened one has
locks and mapped files, which do not travel between processes.

What vLLM can do and these layers cannot (several devices for one matrix, adapters on them, mixtures
of experts) is refused by name before anything is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint import QuantizationConfig as Stored
from dropbydrop.runtime.plane_store import PlaneStore
from dropbydrop.system.errors import FormatError, PrecisionError, UnsupportedModelError

from .layers import Codes, NestedLinearMethod, RowsMethod
from .names import Names

OPTIONS = "dropbydrop"  # key of --additional-config


def asked_bits(options: object, stored: Stored) -> int:
    """The level that --additional-config asks for; by default the highest.

    Raises:
        PrecisionError: not a level, or options that are not known.
    """
    options = {} if options is None else options
    if not isinstance(options, dict) or (unknown := set(options) - {"bits"}):
        what = sorted(unknown) if isinstance(options, dict) else options
        raise PrecisionError(
            f"--additional-config has {what} for {OPTIONS!r}, which is not known. "
            """Give a level: --additional-config '{"dropbydrop": {"bits": 3}}'."""
        )
    return stored.check_level(options.get("bits", stored.levels[-1]))


def options_of(config: VllmConfig) -> object:
    """Our part of --additional-config."""
    given = config.additional_config
    return given.get(OPTIONS) if isinstance(given, dict) else None


def check_engine(config: VllmConfig) -> None:
    """Raise UnsupportedModelError for what these layers cannot do."""
    parallel = config.parallel_config
    for name, count in (
        ("tensor", parallel.tensor_parallel_size),
        ("pipeline", parallel.pipeline_parallel_size),
    ):
        if count > 1:
            raise UnsupportedModelError(
                f"{name} parallelism over {count} devices is not supported: the rotation of a "
                "matrix mixes all of its inputs. Serve with one device for each copy of the model "
                "(--data-parallel-size), at a level that fits into its memory."
            )
    if config.lora_config is not None:
        raise UnsupportedModelError(
            "LoRA adapters are not supported by these layers in vLLM. Attach them in Python "
            "instead (docs/api.md)."
        )


class DropByDropConfig(QuantizationConfig):
    """See the module's note.

    Attributes:
        stored: the validated description of the checkpoint.
        folder: where it is; known after `maybe_update_config`.
        names: which of its matrices a layer holds.
        rows_read: embeddings and heads whose rows a layer of ours reads.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored, self.folder, self.names = stored, "", Names(stored)
        self.rows_read: set[str] = set()
        self._codes: Codes | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_codes": None}

    def get_name(self) -> Any:
        return "dropbydrop"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DropByDropConfig:
        """The config of a checkpoint.

        Raises:
            FormatError: unknown version, unknown keys, contradictions.
        """
        return cls(Stored.from_dict(dict(config)))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note the folder. Raises FormatError: it is not a checkpoint, or not of this config."""
        del hf_config, revision
        self.folder = model_name
        if Checkpoint.open(Path(model_name)).quantization.to_dict() != self.stored.to_dict():
            raise FormatError(
                f"the quantization_config given to vLLM differs from that of {model_name}. Leave "
                "it alone (--hf-overrides); the level is chosen with --additional-config."
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.names.rename(hf_to_vllm_mapper.map_name)

    @property
    def codes(self) -> Codes:
        """The opened checkpoint and the level to read; checked when the first layer asks."""
        if self._codes is None:
            config = get_current_vllm_config()
            check_engine(config)
            bits = asked_bits(options_of(config), self.stored)
            checkpoint = Checkpoint.open(Path(self.folder))
            checkpoint.require(bits)
            self._codes = Codes(PlaneStore(checkpoint), bits)
        return self._codes

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer. Raises UnsupportedModelError: see `names`, and experts."""
        if isinstance(layer, RoutedExperts):
            raise UnsupportedModelError(
                f"{prefix} is a mixture of experts, which this plugin does not serve. Use: "
                "dropbydrop serve."
            )
        if isinstance(layer, VocabParallelEmbedding):
            stored = self._table(layer, prefix)
            return None if stored is None else RowsMethod(self.codes, stored)
        if not isinstance(layer, LinearBase):
            return None
        modules = self.names.linear(prefix, self.packed_modules_mapping)
        if modules is None:
            return UnquantizedLinearMethod()
        return NestedLinearMethod(self.codes, modules)

    def _table(self, layer: nn.Module, prefix: str) -> str | None:
        """The stored embedding whose rows a layer reads; None if its weight is dense."""
        spec = self.stored.embeddings
        if isinstance(layer, ParallelLMHead):
            if self.names.linear(prefix, {}) is not None:
                raise UnsupportedModelError(
                    f"the output head {prefix} is made of codes, which vLLM cannot read. Use: "
                    "dropbydrop serve."
                )
            found = spec.modules[0] if spec.tied else self.names.embedding(prefix)
        else:
            found = self.names.embedding(prefix)
        if found is None or spec.bits == 16:
            return None
        if not (isinstance(layer, ParallelLMHead) and spec.tied):  # it becomes the embedding
            self.rows_read.add(found)
        return found
