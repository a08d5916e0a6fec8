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
from dropbydrop.checkpoint.config import table_inputs_name
from dropbydrop.coding.rotation import Rotation
from dropbydrop.runtime.plane_store import PlaneStore
from dropbydrop.runtime.tables import TableSource
from dropbydrop.system.errors import FormatError

from .ops import key_of, rotation_of

Layer = Any  # a layer of vLLM, which carries attributes of ours


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

    def table_shape(self, name: str) -> tuple[int, ...]:
        """[vocab, d] of an embedding or head that is stored in 8-bit rows or in planes."""
        rest, stored = self.store.checkpoint.rest, self.store.checkpoint.quantization
        if name not in stored.tables:
            return tuple(rest[f"{name}.rows"].shape)
        return tuple(rest[part].shape[0] for part in (f"{name}.scales", table_inputs_name(name)))

    def table(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, Rotation | None]:
        """An embedding or head: int8 [vocab, d] and the value of a step of each row, [vocab].

        The rows of a table in planes are in rotated coordinates and come with the rotation.

        Raises:
            MissingPlaneError, FormatError: a plane is absent or damaged.
        """
        checkpoint = self.store.checkpoint
        stored = checkpoint.quantization
        if name not in stored.tables:
            rows, scales = (checkpoint.read(f"{name}.{leaf}") for leaf in ("rows", "row_scales"))
            return rows, scales, None
        count = stored.table_prefix(stored.prefix_of(self.bits))
        source = TableSource(self.store, name, count)
        made = source.read(device)
        return made.rows, made.row_scales, source.turns(device).forward


def _device() -> torch.device:
    """Where vLLM builds the model now."""
    return torch.empty(0).device


class NestedLinearMethod(LinearMethodBase):
    """A linear layer that reads the first planes of its codes, one input group or a part of one."""

    def __init__(self, codes: Codes, modules: tuple[str, ...]) -> None:
        self.codes, self.modules = codes, modules

    def create_weights(
        self,
        layer: Layer,
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

    def process_weights_after_loading(self, layer: Layer) -> None:
        if layer.dropbydrop_groups is None:
            layer.dropbydrop_groups = self.codes.groups(self.modules, layer.dropbydrop_device)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., d_in] -> [..., rows of all matrices]."""
        y = torch.ops.vllm.dropbydrop_linear(x, layer.dropbydrop_key, layer.dropbydrop_width)
        return y if bias is None else y + bias


class RowsMethod(QuantizeMethodBase):
    """Eight-bit rows of an embedding, a head, or of both where the head is tied.

    Tables in planes are decoded to such rows while loading, those of the level (runtime/tables.py):
    rows that are looked up are rotated back, and the input of a head is rotated.
    """

    def __init__(self, codes: Codes, stored: str) -> None:
        self.codes, self.stored = codes, stored

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Note where the rows go. Raises FormatError: a shape that is not the checkpoint's."""
        rows = self.codes.table_shape(self.stored)
        asked = (layer.org_vocab_size, input_size_per_partition)
        if rows != asked:
            raise FormatError(
                f"{self.stored} has {list(rows)} rows in the checkpoint, vLLM needs {list(asked)}: "
                "config.json is of another model. Fetch it again."
            )
        layer.dropbydrop_padding = sum(output_partition_sizes) - asked[0]
        layer.dropbydrop_device, layer.dropbydrop_dtype = _device(), params_dtype
        layer.rows = layer.row_scales = layer.turn_signs = layer.turn_odd = None

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        """A tied head is the embedding itself."""
        return embed_tokens

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Read the rows; vLLM's padding of the vocabulary gets zeros."""
        if layer.rows is not None:
            return
        device, padding = layer.dropbydrop_device, layer.dropbydrop_padding
        rows, scales, rotation = self.codes.table(self.stored, device)
        found = {"rows": F.pad(rows, (0, 0, 0, padding)), "row_scales": F.pad(scales, (0, padding))}
        if rotation is not None:  # its tensors become inputs of a compiled graph, as the rows do
            found["turn_signs"] = rotation.signs
            if rotation.odd is not None:
                found["turn_odd"] = rotation.odd
        for name, tensor in found.items():
            delattr(layer, name)
            placed = nn.Parameter(tensor.to(device, copy=not padding), requires_grad=False)
            layer.register_parameter(name, placed)

    def embedding(self, layer: Layer, input_: Tensor) -> Tensor:
        """Ids [...] -> [..., d]."""
        scales = F.embedding(input_, layer.row_scales[:, None])  # [..., 1]
        wide = F.embedding(input_, layer.rows).float() * scales.float()
        if layer.turn_signs is not None:
            wide = torch.ops.vllm.dropbydrop_turn_back(wide, layer.turn_signs, layer.turn_odd)
        return wide.to(layer.dropbydrop_dtype)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., d] -> logits [..., padded vocabulary]."""
        if layer.turn_signs is not None:
            x = kernels.rotate(x, rotation_of(layer.turn_signs, layer.turn_odd)).to(x.dtype)
        return kernels.rows_linear(x, layer.rows, layer.row_scales, bias)
