"""Linears, embedding and head as methods of vLLM's layers.

A layer holds no parameters that vLLM would load: its planes are read from the checkpoint when vLLM
has loaded everything else (`process_weights_after_loading`), straight into the layout that the
kernel of the device reads. Products and decoding are dropbydrop's own (`dropbydrop.kernels`), which
also decide what runs: look-up tables for few tokens, a decoded matrix for many, Triton or CUDA
kernels on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from dropbydrop import kernels
from dropbydrop.runtime.plane_store import PlaneStore
from dropbydrop.system.errors import FormatError

from .ops import key_of


@dataclass(frozen=True)
class Codes:
    """An opened checkpoint and the level that is read of it."""

    store: PlaneStore
    bits: int

    def groups(
        self, modules: Sequence[str], device: torch.device
    ) -> dict[int, kernels.PreparedGroup]:
        """Matrices of one input group, read from disk and ready for the kernel of a device.

        Level -> what multiplies at it: on a CPU all levels that these planes serve, on the same
        memory; elsewhere the one.

        Raises:
            MissingPlaneError, FormatError: a plane is absent or damaged.
        """
        checkpoint = self.store.checkpoint
        stored, prefix = checkpoint.quantization, checkpoint.quantization.prefix_of(self.bits)
        entries = self.store.input_group(modules[0], device)
        books = self.store.derived(
            ("books", entries.codebooks), lambda: kernels.prepare_codebooks(entries.books)
        )
        matrices = []
        for module in modules:
            planes = tuple(
                kernels.to_device_layout(
                    checkpoint.read_codes(module, m).to(device, copy=True),
                    spec,
                    *checkpoint.shapes[module],
                )
                for m, spec in enumerate(stored.planes[:prefix], 1)
            )
            scales = checkpoint.read(f"{module}.scales").to(device, copy=True)
            matrices.append(kernels.Matrix(planes, scales))
        return {
            level: kernels.prepare_group(matrices, books, entries.rotation, stored.prefix_of(level))
            for level in (stored.served_by(prefix) if device.type == "cpu" else (self.bits,))
        }


def _device() -> torch.device:
    """Where vLLM builds the model now."""
    return torch.empty(0).device


class NestedLinearMethod(LinearMethodBase):
    """A linear layer that reads the first planes of its codes, one input group or a part of one."""

    def __init__(self, codes: Codes, modules: tuple[str, ...]) -> None:
        self.codes, self.modules = codes, modules

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Note where the planes go. Raises FormatError: shapes that are not the checkpoint's."""
        shapes = [self.codes.store.checkpoint.shapes[module] for module in self.modules]
        asked = (sum(output_partition_sizes), input_size_per_partition)
        if asked != (sum(shape[0] for shape in shapes), shapes[0][1]):
            raise FormatError(
                f"{list(self.modules)} have the shapes {shapes} in the checkpoint, vLLM needs "
                f"{list(asked)} in all: config.json is of another model. Fetch it again."
            )
        key = key_of(self.modules)
        get_current_vllm_config().compilation_config.static_forward_context[key] = layer
        layer.dropbydrop_key, layer.dropbydrop_width = key, asked[0]
        layer.dropbydrop_device, layer.dropbydrop_groups = _device(), None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.dropbydrop_groups is None:
            layer.dropbydrop_groups = self.codes.groups(self.modules, layer.dropbydrop_device)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., d_in] -> [..., rows of all matrices]."""
        y = torch.ops.vllm.dropbydrop_linear(x, layer.dropbydrop_key, layer.dropbydrop_width)
        return y if bias is None else y + bias


class RowsMethod(QuantizeMethodBase):
    """Eight-bit rows of an embedding, a head, or of both where the head is tied."""

    def __init__(self, codes: Codes, stored: str) -> None:
        self.codes, self.stored = codes, stored

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Note where the rows go. Raises FormatError: a shape that is not the checkpoint's."""
        rows = self.codes.store.checkpoint.rest[f"{self.stored}.rows"].shape
        asked = (layer.org_vocab_size, input_size_per_partition)
        if tuple(rows) != asked:
            raise FormatError(
                f"{self.stored} has {list(rows)} rows in the checkpoint, vLLM needs {list(asked)}: "
                "config.json is of another model. Fetch it again."
            )
        layer.dropbydrop_padding = sum(output_partition_sizes) - asked[0]
        layer.dropbydrop_device, layer.dropbydrop_dtype = _device(), params_dtype
        layer.dropbydrop_tied = False
        layer.rows = layer.row_scales = None

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A tied head is the embedding itself."""
        return embed_tokens

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the rows; vLLM's padding of the vocabulary gets zeros."""
        if layer.rows is not None:
            return
        read, device = self.codes.store.checkpoint.read, layer.dropbydrop_device
        padding = layer.dropbydrop_padding
        rows = F.pad(read(f"{self.stored}.rows"), (0, 0, 0, padding))
        scales = F.pad(read(f"{self.stored}.row_scales"), (0, padding))
        del layer.rows, layer.row_scales
        for name, tensor in (("rows", rows), ("row_scales", scales)):
            placed = nn.Parameter(tensor.to(device, copy=not padding), requires_grad=False)
            layer.register_parameter(name, placed)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Ids [...] -> [..., d]."""
        scales = F.embedding(input_, layer.row_scales[:, None])  # [..., 1]
        wide = F.embedding(input_, layer.rows).float() * scales.float()
        return wide.to(layer.dropbydrop_dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., d] -> logits [..., padded vocabulary]."""
        return kernels.rows_linear(x, layer.rows, layer.row_scales, bias)
