"""Eight-bit rows for the token embedding and the output head.

    w = rows * row_scales,   rows int8 [vocab, d], row_scales float16 [vocab]

An embedding widens the rows that are looked up; a head multiplies by the integers themselves
(kernels/int8_head.py) and makes no dense copy. A tied head shares the rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropbydrop import kernels

from .modules import FixedScales


class _Int8Rows(FixedScales):
    """rows int8 [vocab, d] and row_scales float16 [vocab], on the meta device until they are read.

    `persistent`: whether the row scales are saved.
    """

    rows: Tensor
    row_scales: Tensor
    _fixed = ("row_scales",)

    def __init__(self, vocab: int, dim: int, persistent: bool = True) -> None:
        super().__init__()
        rows = torch.empty(vocab, dim, dtype=torch.int8, device="meta")
        self.register_parameter("rows", nn.Parameter(rows, requires_grad=False))
        scales = torch.empty(vocab, dtype=torch.float16, device="meta") if persistent else None
        self.register_buffer("row_scales", scales, persistent=persistent)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """w [vocab, d]."""
        return (self.rows.float() * self.row_scales.float()[:, None]).to(dtype)


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
    ) -> None:
        super().__init__(vocab, dim)
        self.num_embeddings, self.embedding_dim, self.dtype = vocab, dim, dtype
        self.scale, self._kind = scale, kind
        self._factor = _rounded(scale, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., d]."""
        scales = F.embedding(ids, self.row_scales[:, None])  # [..., 1]
        wide = F.embedding(ids, self.rows).float() * scales.float()  # [..., d]
        out = wide.to(self.dtype)
        return out if self._factor == 1.0 else out * self._factor

    @property
    def weight(self) -> RowView:
        """Rows of w in the type of the output, those that are asked for."""

        def widen(ids: Tensor) -> Tensor:
            return (self.rows[ids].float() * self.row_scales[ids].float()[..., None]).to(self.dtype)

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

    def __init__(self, vocab: int, dim: int, bias: Tensor | None, tied: bool) -> None:
        super().__init__(vocab, dim, persistent=not tied)
        self.out_features, self.in_features, self.tied = vocab, dim, tied
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] -> logits [..., vocab], in the dtype of x."""
        return kernels.rows_linear(x, self.rows, self.row_scales, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied={self.tied}"


def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as a tensor of `dtype` holds it."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))
