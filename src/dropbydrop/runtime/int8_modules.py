"""Eight-bit rows for the token embedding and the output head.

    w = rows * row_scales,   rows int8 [vocab, d], row_scales float16 [vocab]

An embedding widens the rows that are looked up; a head multiplies by the integers themselves
(kernels/int8_head.py) and makes no dense copy. A tied head shares the rows of the embedding.

Tables in planes have such rows too, made from their planes after loading (tables.py), in rotated
coordinates: w = (rows * row_scales) Q. A look-up rotates its rows back, a head rotates its input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropbydrop import kernels

from .modules import FixedScales
from .tables import TableRows, TableSource


class _Int8Rows(FixedScales):
    """rows int8 [vocab, d] and row_scales float16 [vocab], on the meta device until they are read.

    `persistent`: whether the row scales are saved. With a `source` both are made from planes by
    `settle`; what transformers reads is `scales`, float16 [vocab].
    """

    rows: Tensor
    row_scales: Tensor
    scales: Tensor
    _fixed = ("row_scales", "scales")
    _kept = ("rows",)

    def __init__(
        self, vocab: int, dim: int, persistent: bool = True, source: TableSource | None = None
    ) -> None:
        super().__init__()
        self.source, self._table = source, cast("TableRows | None", None)
        scales = torch.empty(vocab, dtype=torch.float16, device="meta") if persistent else None
        if source is None:
            rows = torch.empty(vocab, dim, dtype=torch.int8, device="meta")
            self.register_parameter("rows", nn.Parameter(rows, requires_grad=False))
            self.register_buffer("row_scales", scales, persistent=persistent)
        else:
            self.register_parameter("rows", None)
            self.register_buffer("row_scales", None, persistent=False)
            self.register_buffer("scales", scales, persistent=persistent)

    def settle(self, device: torch.device, count: int | None = None) -> None:
        """Make the rows of a table in planes, of a fresh module; with `count` planes, of a view."""
        assert self.source is not None
        self.source = self.source if count is None else replace(self.source, count=count)
        self._table = table = self.source.read(device)
        self._parameters["rows"] = nn.Parameter(table.rows, requires_grad=False)
        self._buffers["row_scales"] = table.row_scales

    def unrotated(self, wide: Tensor) -> Tensor:
        """Rows of W' [..., d] -> rows of W, in the type of `wide`."""
        if self.source is None:
            return wide
        return self.source.turns(wide.device).transpose(wide)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w [vocab, d]."""
        return self.unrotated(self.rows.float() * self.row_scales.float()[:, None]).to(dtype)


class RowView:
    """What stands for the weight of an embedding where a model's code takes single rows of it.

    Gemma 4 looks up the row of the padding token in this way. `view[ids]` and `view[ids, :]` widen
    those rows; any other index widens all of them.
    """

    def __init__(self, shape: torch.Size, widen: Callable[[Tensor], Tensor], place: Tensor) -> None:
        self.shape, self._widen, self._place = shape, widen, place

    def __getitem__(self, index: Any) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        ids = torch.arange(self.shape[0], device=self._place.device)
        if isinstance(first, (int, slice, Tensor)):
            return self._widen(ids[first])[(..., *rest)]
        return self._widen(ids)[index]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the weight of a quantized embedding has no {name!r}: its rows can be read, and not "
            "changed or resized. Resize the original model, and quantize that."
        )


class NestedEmbedding(_Int8Rows):
    """Eight-bit token embedding.

    `dtype` is the type of the output; casting the module changes it, and nothing else. `scale`
    multiplies the output, rounded to that type first as Gemma does; the rows are those of w.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        dtype: torch.dtype,
        scale: float = 1.0,
        kind: type[nn.Embedding] = nn.Embedding,
        source: TableSource | None = None,
    ) -> None:
        super().__init__(vocab, dim, source=source)
        self.num_embeddings, self.embedding_dim, self.dtype = vocab, dim, dtype
        self.scale, self._kind = scale, kind
        self._factor = _rounded(scale, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d]."""
        scales = F.embedding(ids, self.row_scales[:, None])  # [..., 1]
        wide = F.embedding(ids, self.rows).float() * scales.float()  # [..., d]
        out = self.unrotated(wide).to(self.dtype)
        return out if self._factor == 1.0 else out * self._factor

    @property
    def weight(self) -> RowView:
        """Rows of w in the type of the output, those that are asked for."""

        def widen(ids: Tensor) -> Tensor:
            wide = self.rows[ids].float() * self.row_scales[ids].float()[..., None]
            return self.unrotated(wide).to(self.dtype)

        return RowView(self.rows.shape, widen, self.rows)

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        """An embedding of the original class with the decoded weights."""
        weight = nn.Parameter(self.dense_weight(dtype), requires_grad=False)
        plain = self._kind is nn.Embedding
        rest: dict[str, Any] = {} if plain else {"padding_idx": None, "embed_scale": self.scale}
        module = self._kind(1, 1, **rest).to(weight.device)
        module.num_embeddings, module.embedding_dim = self.num_embeddings, self.embedding_dim
        module.weight = weight
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._factor = _rounded(self.scale, self.dtype)
        return cast(NestedEmbedding, super()._apply(fn, recurse))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class NestedHead(_Int8Rows):
    """Eight-bit output head: logits = (x rows^T) * row_scales (+ bias).

    When `tied`, rows are the embedding's (transformers ties the parameter `rows`) and row_scales
    is its buffer, not saved a second time. No dense copy is made (kernels/int8_head.py).
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        vocab: int,
        dim: int,
        bias: Tensor | None,
        tied: bool,
        source: TableSource | None = None,
    ) -> None:
        super().__init__(vocab, dim, persistent=not tied, source=source)
        self.out_features, self.in_features, self.tied = vocab, dim, tied
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> logits [..., vocab], in the dtype of x."""
        if self.source is not None:
            x = self.source.turns(x.device).apply(x).to(x.dtype)
        return kernels.rows_linear(x, self.rows, self.row_scales, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied={self.tied}"


def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as a tensor of `dtype` holds it."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))
