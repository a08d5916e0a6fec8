"""What belongs into a checkpoint's files and what does not: tensors, their values, further files.

Native code is handed addresses, so what it relies on is decided here, from the headers, before a
tensor is used: every tensor of ours has exactly the type and the shape that the config implies, and
no other tensor can take the place of one. Values that no kernel may meet (infinities, codebooks out
of range) are refused before decoding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.rotation import split_odd
from dropbydrop.coding.tables import rings
from dropbydrop.system.errors import FormatError

from .config import (
    RESERVED_PREFIXES,
    QuantizationConfig,
    codes_name,
    input_scales_name,
    odd_name,
    table_inputs_name,
)
from .tensor_files import FLOAT_TYPES, TensorInfo

# Read by transformers, by its tokenizers or by peft wherever they lie in a model folder.
_READ_BY_OTHERS = re.compile(
    r"adapter_.*|.*_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\..*|merges\.txt|.*\.(model|tiktoken|jinja|py|bin|pt|pth|ckpt|pkl|gguf)"
    r"|chat_template.*|additional_chat_templates|custom_generate|.*\.safetensors(\.index\.json)?"
)
_DOCUMENTS = re.compile(r".*\.(md|jsonl)|LICENSE.*|NOTICE.*")
_ATTENTIONS = ("eager", "sdpa", "flex_attention")  # that fetch nothing


def is_document(name: str) -> bool:
    """Whether a file decides nothing and may be edited after publication."""
    return _DOCUMENTS.fullmatch(name) is not None


def is_read_by_others(name: str) -> bool:
    """Whether libraries read a file or folder of this name, though no manifest lists it."""
    return _READ_BY_OTHERS.fullmatch(name) is not None


def check_model_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse keys of a config.json that make a loader run code, or read other files than ours.

    Raises:
        FormatError: one of them, at any depth.
    """
    for key, value in _items({k: v for k, v in config.items() if k != "quantization_config"}):
        if key == "auto_map":
            raise FormatError(
                f"{where} has 'auto_map', which asks to run code from the checkpoint. dropbydrop "
                "checkpoints never carry code; do not use this one."
            )
        if key == "transformers_weights" and value is not None:
            raise FormatError(
                f"{where} has 'transformers_weights' = {value!r}, which asks to read another file "
                "in the place of model.safetensors. Do not use this checkpoint."
            )
        if key.strip("_") in ("attn_implementation", "attn_implementation_internal"):
            named = value.values() if isinstance(value, dict) else [value]
            if other := [name for name in named if name not in (None, *_ATTENTIONS)]:
                raise FormatError(
                    f"{where} asks for the attention {other[0]!r}, which may be code that is "
                    f"fetched from the Hub. A config may name {', '.join(_ATTENTIONS)}; give "
                    "others to from_pretrained yourself."
                )


def _items(value: object) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def rest_problems(q: QuantizationConfig, rest: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What contradicts a config in the header of its model.safetensors."""
    expected = _expected(q, rest)
    owners = {*q.modules, *q.embeddings.modules}
    optional = {f"{module}.bias" for module in owners}
    for name, info in rest.items():
        owned = name.rpartition(".codes.")[0] or name.rpartition(".")[0]
        if name.startswith(RESERVED_PREFIXES) or (owned in owners and name not in optional):
            if name not in expected:
                yield f"{name!r} is not described"
        elif name not in expected and info.dtype not in FLOAT_TYPES and len(info.shape) > 1:
            yield f"{name!r} is {info}, which no parameter is"
    for name, info in expected.items():
        if name not in rest:
            yield f"{name} is missing"
        elif rest[name] != info:
            yield f"{name} is {rest[name]}, expected {info}"


def _expected(q: QuantizationConfig, rest: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Type and shape of every tensor that the config describes, and of biases that are there.

    Sizes that only the file knows (d_out, the vocabulary) are taken from one tensor each.
    """

    def sizes(name: str, count: int) -> tuple[int, ...]:
        """The shape of a tensor if it has `count` dimensions, none of them 0; else one that no
        tensor has."""
        shape = rest[name].shape if name in rest else ()
        return shape if len(shape) == count and all(shape) else (-1,) * count

    expected = {name: TensorInfo("F16", (0,)) for name in q.guards} | q.codebooks
    for i, group in enumerate(q.input_groups):
        odd = split_odd(group.d_in)[1]
        expected[input_scales_name(i)] = TensorInfo("U8", (group.d_in,))
        if odd > 1:
            expected[odd_name(odd)] = TensorInfo("F32", (odd, odd))
    rows = {
        module: (group.experts, *sizes(f"{module}.scales", 2)[1:])
        if group.experts
        else sizes(f"{module}.scales", 1)
        for group in q.input_groups
        for module in group.modules
    }
    expected |= {f"{module}.scales": TensorInfo("F16", shape) for module, shape in rows.items()}
    for module in q.tables:
        rows[module], (d,) = sizes(f"{module}.scales", 1), sizes(table_inputs_name(module), 1)
        expected[f"{module}.scales"] = TensorInfo("F16", rows[module])
        expected[table_inputs_name(module)] = TensorInfo("U8", (d,))
        if (odd := split_odd(max(d, 1))[1]) > 1:
            expected[odd_name(odd)] = TensorInfo("F32", (odd, odd))
    for module in () if q.tables else q.embeddings.modules:
        eight = q.embeddings.bits == 8
        table = sizes(f"{module}.rows" if eight else f"{module}.weight", 2)
        rows[module] = table[:1]
        if eight:
            expected[f"{module}.rows"] = TensorInfo("I8", table)
            expected[f"{module}.row_scales"] = TensorInfo("F16", table[:1])
        else:
            found = rest.get(f"{module}.weight")
            kind = "BF16" if found is not None and found.dtype == "BF16" else "F16"
            expected[f"{module}.weight"] = TensorInfo(kind, table)
    for module, shape in rows.items():
        if (bias := rest.get(f"{module}.bias")) is not None:
            kind = bias.dtype if bias.dtype in FLOAT_TYPES else "F16"
            expected[f"{module}.bias"] = TensorInfo(kind, shape)
    return expected


def plane_tensors(
    q: QuantizationConfig,
    matrices: Mapping[str, tuple[int, ...]],
    rest: Mapping[str, TensorInfo],
    m: int,
) -> dict[str, TensorInfo]:
    """Every tensor of plane file m, in the order of a writer.

    Args:
        matrices: quantized module -> its shape.
        rest: header of model.safetensors, which knows the sizes of tables.
    """
    plane = q.planes[m - 1]
    found = {codes_name(n, m): TensorInfo("U8", plane.shape(*s)) for n, s in matrices.items()}
    for module in q.tables:
        vocab, d = rest[f"{module}.scales"].shape[0], rest[table_inputs_name(module)].shape[0]
        for k in range(q.table_prefix(m - 1) + 1, q.table_prefix(m) + 1):
            shape = q.embeddings.planes[k - 1].shape(*rings(vocab), d)
            found[codes_name(module, k)] = TensorInfo("U8", shape)
    return found


def value_problem(name: str, tensor: Tensor) -> str | None:
    """What is wrong with the values of a tensor of model.safetensors; None if nothing is.

    Floats are finite; eight-bit rows are -127 ... 127, which sums of integers rely on.
    """
    if not tensor.numel():
        return None
    if tensor.dtype == torch.int8 and name.endswith(".rows"):
        return None if int(tensor.min()) > -128 else f"{name} has the value -128"
    if not tensor.is_floating_point():
        return None
    low, high = torch.aminmax(tensor)  # NaN wherever there is one
    finite = math.isfinite(low.item()) and math.isfinite(high.item())
    return None if finite else f"{name} has values that are not finite"
