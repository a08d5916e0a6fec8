"""What a loaded model takes: weights exactly, key-value cache exactly, activations estimated.

    weights      unique tensor bytes of the modules (codes of the planes in use, scales, biases,
                 embeddings, norms) as a loaded model holds them, plus codebooks and rotations as
                 stored. Planes are held once; where native CPU kernels run that is their packed
                 form, with rows or inputs padded to 64 (kernels/layout). From headers alone:
                 nothing is loaded to know it.
    kv_cache     2 * layers * key-value heads * head_dim * tokens * bytes a value; a layer with a
                 sliding window keeps at most the window.
    activations  an estimate of the peak of one forward pass over the whole context: hidden states
                 and the widest intermediate results of a block, one decoded matrix in float32, the
                 logits of one token.

One sequence at a time. Python, torch itself and what the allocator keeps (some 300 MB) are not
counted: they do not depend on the plan.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import RESERVED_PREFIXES
from dropbydrop.kernels.int8_head import HEAD_SLAB
from dropbydrop.kernels.layout import plane_bytes
from dropbydrop.models.model_config import context_length, text_settings
from dropbydrop.system.errors import DropError

from .levels import Level, matrices

_FIXED_STATE = ("linear_attention", "conv", "mamba")  # kinds of layers that keep no keys
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes by kind. `codes`, `scales`, `embeddings`, `other` and `shared` are the weights.

    Attributes:
        codes: planes in use, as held on this machine's CPU. scales: of all quantized matrices.
        embeddings: embedding and head. other: norms, biases and the like.
        shared: codebooks, input scales, odd factors, as stored.
        kv_cache, activations: zero when no context was given.
    """

    codes: int
    scales: int
    embeddings: int
    other: int
    shared: int
    kv_cache: int = 0
    activations: int = 0

    @property
    def weights(self) -> int:
        """All weights."""
        return self.codes + self.scales + self.embeddings + self.other + self.shared

    @property
    def total(self) -> int:
        """Weights, cache and activations."""
        return self.weights + self.kv_cache + self.activations

    def to_dict(self) -> dict[str, int]:
        """JSON form, with the sums."""
        return asdict(self) | {"weights": self.weights, "total": self.total}


_MOST = 1e18  # of what stands before a unit; float64 is exact enough up to it


def parse_bytes(text: str | int) -> int:
    """ "1.5GiB" -> 1610612736. Units kB, MB, GB (powers of 1000), KiB, MiB, GiB, or none (bytes).

    Raises:
        DropError: not an amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS or not 0 < float(match[1]) < _MOST:
        raise DropError(f"{text!r} is no amount of memory; write 1.5GiB, 900MB, or bytes.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def estimate(
    checkpoint: Checkpoint,
    prefixes: Mapping[str, Level],
    dtype: torch.dtype | str | None = None,
    context: int = 0,
) -> Memory:
    """Memory of a model with `prefixes` (module -> planes, of a stack perhaps of each expert) and
    `context` tokens of one sequence.

    Args:
        dtype: of the activations; by default the one in the config.
    """
    kind = activation_type(checkpoint, dtype)
    q, width = checkpoint.quantization, kind.itemsize
    codes = sum(
        plane_bytes(plane, *matrix)
        for module, shape in checkpoint.shapes.items()
        for matrix, count in matrices(shape, prefixes[module])
        for plane in q.planes[:count]
    )
    scales = embeddings = other = shared = 0
    for name, info in checkpoint.rest.items():
        module, _, leaf = name.rpartition(".")
        count = info.nbytes // max(info.itemsize, 1)
        if name.startswith(RESERVED_PREFIXES):
            shared += info.nbytes
        elif module in checkpoint.shapes and leaf == "scales":
            scales += info.nbytes
        elif module in q.tables and leaf == "input_scales":
            shared += info.nbytes
            embeddings += checkpoint.rest[f"{module}.scales"].shape[0] * info.nbytes  # int8 rows
        elif module in q.embeddings.modules and leaf in ("rows", "row_scales", "scales"):
            embeddings += info.nbytes
        elif module in q.embeddings.modules:
            embeddings += count * width
        else:
            other += count * (width if info.itemsize > 1 else 1)
    if not context:
        return Memory(codes, scales, embeddings, other, shared)
    return Memory(
        codes,
        scales,
        embeddings,
        other,
        shared,
        kv_cache(checkpoint.config, context, width),
        _activations(checkpoint, context, width),
    )


def kv_cache(config: Mapping[str, Any], context: int, width: int) -> int:
    """Bytes of keys and values of `context` tokens, `width` bytes a value."""
    text = text_settings(config)
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    dim = int(text.get("head_dim") or text["hidden_size"] // heads)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    kinds = text.get("layer_types") or ["sliding_attention" if window else ""] * layers
    tokens = sum(
        min(context, window) if window and kind == "sliding_attention" else context
        for kind in kinds
        if kind not in _FIXED_STATE
    )
    return 2 * tokens * kv_heads * dim * width


def default_context(checkpoint: Checkpoint, context: int | None) -> int:
    """`context`, or 2,048 tokens, or what the model takes if that is less.

    Raises:
        DropError: more than the model takes, or none.
    """
    longest = context_length(checkpoint.config) or 1 << 30
    if context is None:
        return min(2048, longest)
    if not 0 < context <= longest:
        raise DropError(f"a context of {context} tokens; this model takes 1 to {longest:,}.")
    return context


def activation_type(checkpoint: Checkpoint, dtype: torch.dtype | str | None) -> torch.dtype:
    """The torch type that `load(..., dtype=dtype)` computes in.

    Raises:
        DropError: no floating-point type of torch.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if dtype not in (None, "auto") else text_settings(checkpoint.config).get("dtype")
    name = name or checkpoint.config.get("dtype") or "float32"
    kind = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise DropError(f"dtype {name!r} is no floating-point type; use float32 or bfloat16.")
    return kind


def held_bytes(model: Any) -> int:
    """Bytes of the unique tensors of a loaded model or view: what `codes` to `other` predict."""
    tensors = list(model.parameters())  # not state_dict: that has planes in the form of the files
    for module in model.modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        tensors += [t for name in kept if (t := module._buffers[name]) is not None]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _activations(checkpoint: Checkpoint, context: int, width: int) -> int:
    text = text_settings(checkpoint.config)
    shapes = checkpoint.shapes.values()
    hidden, vocab = int(text["hidden_size"]), int(text["vocab_size"])
    inner = max(max(shape[-2:]) for shape in shapes)  # the widest intermediate result
    token = 2 * hidden * width + 4 * hidden + 3 * inner * width + 4 * inner
    matrix = max(d_out * d_in for *_, d_out, d_in in shapes) * (4 + 4 + width)
    head = min(vocab, HEAD_SLAB) * hidden * width
    return context * token + max(matrix, head) + 4 * vocab
