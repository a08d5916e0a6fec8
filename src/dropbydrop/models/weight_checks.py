"""What a folder's weights tell before any work: what would be dropped, misread or not finite.

A folder is taken at its word in its config; where its files say something else, quantizing would
give another model than the one that was asked for, and nothing would look wrong. `check_weights`
therefore compares the two: every stored tensor must have a place in the model, with its shape, in a
floating-point type that is what it seems, and tied weights must be one. `check_values` reads all
weights once (seconds a GB) and looks for values that are not finite or cannot be stored.

The same tensors are ignored as transformers ignores: what a class lists in
`_keys_to_ignore_on_load_unexpected` (layers for multi-token prediction, buffers of old releases).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from dropbydrop.system.errors import FormatError, UnsupportedModelError

from .block_runner import BlockRunner
from .experts import stack_names
from .input_groups import codable
from .key_names import KeyNames

TYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_IGNORED = (r"rotary_emb\.inv_freq$", r"\.position_ids$", r"^position_ids$")
_HALF = 65504.0  # largest float16, the type of row scales
_STEP = 2.0**-24  # smallest; a scale of so few of them that rounding counts is refused


def check_weights(runner: BlockRunner) -> None:
    """Compare the headers of the weight files with the model.

    Raises:
        UnsupportedModelError: tensors that the model has no place for, or of another type.
        FormatError: a shape that contradicts the config.
    """
    model, files = runner.model, runner.files
    keys = KeyNames(model, files)
    patterns = [*_IGNORED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    unused = [key for key in keys.unused if not any(re.search(p, key) for p in patterns)]
    if unused:
        scales = [key for key in unused if "scale" in key or "zero" in key]
        why = (
            "They look like scales: the weights are codes of a quantized model, whose config has "
            "lost its quantization_config. Take the model it was made from."
            if scales
            else "Its config.json is of another model, with fewer layers or other parts; take both "
            "from one place."
        )
        raise UnsupportedModelError(
            f"{files.folder} holds {len(unused)} tensors that {type(model).__name__} has no place "
            f"for (first: {(scales or unused)[0]}), and which would be dropped. {why}"
        )
    for stored in _placed(runner, keys):
        if stored.floating and files.dtype(stored.key) not in TYPES:
            raise UnsupportedModelError(
                f"{stored.key} is stored as {files.dtype(stored.key)}, which is no floating-point "
                "type of 16 bits or more: codes of a quantized model. Take the model it was made "
                "from."
            )
        if stored.shape is not None and files.shape(stored.key) != stored.shape:
            raise FormatError(
                f"{stored.key} is stored as {files.shape(stored.key)}; its config asks for "
                f"{stored.shape}. The weights belong to another config."
            )
    _check_ties(runner, keys)


def check_values(runner: BlockRunner, head_bits: int) -> None:
    """Read all weights once.

    Raises:
        FormatError: values that are not finite, or beyond what their stored form can hold.
    """
    keys = KeyNames(runner.model, runner.files)
    linears = {f"{n}.weight" for n, m in runner.model.named_modules() if isinstance(m, nn.Linear)}
    coded = {f"{n}.weight" for n in codable(runner.model, "")}
    linears |= set(stack_names(runner.model))
    rows = {f"{name}.weight" for name in (*runner.embedding_modules, *runner.head_modules)}
    for stored in _placed(runner, keys):
        if not stored.floating:
            continue
        largest = 0.0
        for part in runner.files.parts(stored.key):
            if part.numel():
                ends = part.aminmax()  # NaN if any value is
                largest = max(-float(ends.min), float(ends.max), largest)
            if not largest < float("inf"):
                raise FormatError(
                    f"{stored.key} in {runner.files.folder} holds values that are not finite (NaN "
                    "or infinity): the model is damaged. Download it again, or ask its author."
                )
        least, most = 0.0, float("inf")
        if stored.name in rows:
            whole = runner.files.dtype(stored.key) == "BF16"
            most = 127 * _HALF if head_bits == 8 else float("inf") if whole else _HALF
            # tables in planes are rows of eight bits when they are read
            least = 0.0 if head_bits == 16 and whole else 127 * 128 * _STEP
        elif stored.name in linears:
            most = _HALF / 4  # a row's scale is about its root mean square, with input scales
            # an expert alone may be dead
            least = 8 * 128 * _STEP if stored.name in coded else 0.0
        if 0 < largest < least:
            raise FormatError(
                f"{stored.key} in {runner.files.folder} holds no value beyond {largest:.3g}, too "
                f"small for float16, in which scales are stored (at least {least:.3g} here). "
                "Multiply it by a power of two, and divide what follows or goes before by it."
            )
        if largest > most:
            raise FormatError(
                f"{stored.key} in {runner.files.folder} holds values up to {largest:.3g}, too "
                f"large for float16, in which scales are stored (at most {most:.3g} here). The "
                "model is damaged, or was never meant for 16 bits."
            )


def dtype_of(runner: BlockRunner) -> str:
    """The type that most of a model's values are stored in, such as "bfloat16"."""
    files, counts = runner.files, Counter[str]()
    for key in files:
        if (kind := files.dtype(key)) in TYPES:
            counts[TYPES[kind]] += prod(files.shape(key))
    return counts.most_common(1)[0][0] if counts else "float32"


@dataclass(frozen=True)
class _Stored:
    """A stored tensor that the model has a place for: `shape` where it must have this one."""

    name: str
    key: str
    floating: bool
    shape: tuple[int, ...] | None


def _placed(runner: BlockRunner, keys: KeyNames) -> Iterator[_Stored]:
    seen = set[str]()
    for name, tensor in runner.model.state_dict(keep_vars=True).items():
        recipe = keys.recipe(name)
        if recipe is None or not isinstance(tensor, Tensor):
            continue
        for key in recipe.sources:
            if key not in seen:
                seen.add(key)
                whole = None if recipe.operations else tuple(tensor.shape)
                yield _Stored(name, key, tensor.is_floating_point(), whole)


def _check_ties(runner: BlockRunner, keys: KeyNames) -> None:
    """Weights that the config ties must be one and the same where the files hold both."""
    ties = dict(getattr(runner.model, "all_tied_weights_keys", None) or {})
    for target, source in ties.items():
        first, second = keys.recipe(target), keys.recipe(source)
        if first is None or second is None or first.sources == second.sources:
            continue
        both = (runner.files.parts(recipe.sources[0]) for recipe in (first, second))
        shapes = {runner.files.shape(recipe.sources[0]) for recipe in (first, second)}
        if len(shapes) > 1 or not all(a.equal(b) for a, b in zip(*both, strict=True)):
            raise FormatError(
                f"the config of {runner.files.folder} ties {target} to {source} "
                "(tie_word_embeddings), but the files hold two different tensors, one of which "
                "would be dropped. Set tie_word_embeddings to false in config.json if the model "
                f"is to keep its {target}; else remove that tensor."
            )
