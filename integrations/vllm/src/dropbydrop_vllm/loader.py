"""Reads one level of a checkpoint, and nothing of the others.

vLLM's default loader reads every safetensors file of a folder. Here the tensors of
model.safetensors that vLLM's own layers hold (norms, biases, 16-bit embeddings) go its way; codes,
scales and 8-bit rows are read by the layers themselves (`layers`), of no plane above their level.

The loader of `--load-format auto` is replaced by one that does this for our checkpoints and leaves
all others to vLLM: there is no seam by which a quantization names its loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import RESERVED_PREFIXES, table_inputs_name
from dropbydrop.system.errors import FormatError, UnsupportedModelError

from .config import DropByDropConfig

FORMATS = ("auto", "hf", "safetensors")


def dense_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """Names in model.safetensors of what vLLM's own layers hold."""
    stored = checkpoint.quantization
    ours = {f"{module}.scales" for module in stored.modules}
    ours |= {
        f"{name}.{leaf}" for name in stored.embeddings.modules for leaf in ("rows", "row_scales")
    }
    for name in stored.tables:
        ours |= {f"{name}.scales", table_inputs_name(name)}
    ours |= set(stored.guards)
    for name in checkpoint.rest:
        if name not in ours and not name.startswith(RESERVED_PREFIXES):
            yield name


def dense_tables(config: DropByDropConfig) -> list[str]:
    """Tables that vLLM asked no method for, as in Gemma and Gemma 2: it gets dense ones."""
    spec = config.stored.embeddings
    return [name for name in spec.modules if spec.bits != 16 and name not in config.rows_read]


class Loader(DefaultModelLoader):
    """See the module's note."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises FormatError: damaged files, tensors that the model lacks or needs."""
        if model_config.quantization != "dropbydrop":
            return super().load_weights(model, model_config)
        config = get_current_vllm_config().quant_config
        assert isinstance(config, DropByDropConfig)
        checkpoint = config.codes.store.checkpoint
        checkpoint.check_contents(checkpoint.quantization.prefix_of(config.codes.bits))
        if left := config.names.left():
            raise UnsupportedModelError(
                f"{type(model).__name__} of vLLM has no layer for {left[0]} and "
                f"{len(left) - 1} other quantized matrices. Serve with: dropbydrop serve."
            )

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name in dense_tensors(checkpoint):
                yield name, checkpoint.read(name)
            for name in dense_tables(config):
                rows, scales, rotation = config.codes.table(name, torch.device("cpu"))
                weight = rows.float() * scales.float()[:, None]
                yield f"{name}.weight", weight if rotation is None else rotation.transpose(weight)

        try:
            loaded = cast(Any, model).load_weights(weights())
            self.track_weights_loading(model, loaded, quantized=True)
        except ValueError as error:
            raise FormatError(
                f"{checkpoint.path} does not fit {type(model).__name__} of vLLM ({error}). Fetch "
                "it again, or serve it with: dropbydrop serve."
            ) from error
        return None


def register() -> None:
    """Replace vLLM's loader of whole folders, once in a process."""
    known = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for name in FORMATS:
        if known.get(name) is DefaultModelLoader:
            del known[name]  # register_model_loader warns of what it replaces
            register_model_loader(name)(Loader)
