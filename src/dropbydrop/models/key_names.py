"""Which stored tensors make a parameter of a model, and how: transformers' own table, read lazily.

The keys of a folder's weight files are not always the names of the model's parameters. A wrapper
of several modalities was saved under other prefixes, a family renamed its modules, and experts are
stored one by one while the module holds all of them in one tensor. transformers knows all that:
`conversion_mapping` lists, for each model class, renamings (a key becomes another) and converters
(several keys become one parameter through operations such as MergeModulelist, Concatenate and
Transpose, or one key becomes several). Its loader converts a whole model at once; a block-by-block
run needs one parameter at a time. So the keys are sorted into parameters here once, by the loader's
own functions and in its order, and `read` fetches and converts only what one parameter is made of.

These functions of transformers are no public API. They are used in this file alone, and
tests/models/test_key_names.py compares them with `from_pretrained` for each kind of conversion, so
that a release that changes them fails there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dropbydrop.system.errors import FormatError, first_line


@dataclass(frozen=True)
class Recipe:
    """How a parameter or buffer is made of stored tensors.

    Attributes:
        sources: their keys, in the order in which the operations take them.
        operations: names of the operations, in order ("MergeModulelist", "Concatenate"); none where
            the one source is the parameter as it is.
    """

    sources: tuple[str, ...]
    operations: tuple[str, ...] = ()


@dataclass
class _Conversion:
    """A converter's work for one parameter, or for several that one key is split into."""

    converter: WeightConverter | None  # None: the first source as it is
    sources: list[tuple[str, str]]  # key, and the converter's pattern that it matches


class KeyNames:
    """The parameters and persistent buffers of a model, by the stored tensors that make them.

    Args:
        model: its parameters may be on the meta device.
        keys: names of the stored tensors.

    Attributes:
        unused: keys that belong to nothing in the model, in order.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        self._model = model
        self._table = _Table(model)
        self._conversions: dict[str, _Conversion] = {}  # by the name its loader gives it
        self._of: dict[str, str] = {}  # parameter -> key of _conversions
        self.unused: list[str] = []
        for key in sorted(keys, key=dot_natural_key):  # experts by number, guards before the rest
            self._place(key)

    def _place(self, key: str) -> None:
        name, pattern = self._table.rename(key)
        if name not in self._table.names:
            self.unused.append(key)
            return
        converter = None if pattern is None else self._table.converter(pattern)
        entry = self._conversions.setdefault(name, _Conversion(converter, []))
        if (entry.converter is None) == (converter is None):
            entry.sources.append((key, pattern or key))
        targets = [name] if converter is None else _targets(name, converter)
        for target in targets:
            if target in self._table.names:
                self._of.setdefault(target, name)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def recipe(self, name: str) -> Recipe | None:
        """How a parameter or persistent buffer is made; None if no stored tensor belongs to it."""
        if name not in self._of:
            return None
        entry = self._conversions[self._of[name]]
        if entry.converter is None:
            return Recipe((entry.sources[0][0],))
        operations = tuple(type(operation).__name__ for operation in entry.converter.operations)
        return Recipe(tuple(key for key, _ in entry.sources), operations)

    def read(self, name: str, fetch: Callable[[str], Tensor]) -> Tensor:
        """The parameter or buffer, of what `fetch` returns for its sources.

        Several times its size is in memory for a moment, while sources are put together.

        Raises:
            KeyError: nothing stored belongs to `name`.
            FormatError: the sources do not fit together.
        """
        entry = self._conversions[self._of[name]]
        if entry.converter is None:
            return fetch(entry.sources[0][0])
        converter = deepcopy(entry.converter)  # it collects the tensors of one conversion
        for key, pattern in entry.sources:
            converter.add_tensor(name, key, pattern, _later(fetch, key))
        first = self._of[name]
        try:
            made: Any = converter.convert(first, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{name} cannot be put together from {entry.sources[0][0]} and "
                f"{len(entry.sources) - 1} more ({first_line(error)}); the folder lacks some of "
                "them or is damaged. Download the model again."
            ) from error
        made = made[0] if isinstance(made, tuple) else made  # with errors, in transformers 5.0
        tensor = made[name]
        whole: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        # a part of a larger tensor would keep all of it in memory
        return whole.clone() if whole.untyped_storage().nbytes() > whole.nbytes else whole


class ModuleNames:
    """Names of modules in a model, by those that a checkpoint has, perhaps of another class.

    A text decoder that is loaded from the folder of a wrapper has its modules under another prefix.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._table = _Table(model)

    def find(self, stored: str) -> str:
        """The name in the model; whether it has such a module is not said."""
        return self._table.rename(f"{stored}.weight")[0].removesuffix(".weight")


class _Table:
    """Renamings and converters of one model class."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.names: dict[str, Any] = model.state_dict()

    def rename(self, key: str) -> tuple[str, str | None]:
        """The parameter a key belongs to, and the pattern of its converter, as the loader says."""
        place = (self._prefix, self.names)
        name, pattern = rename_source_key(key, self._renamings, self._converters, *place)
        if name not in self.names and key in self.names:  # its new name already
            name, pattern = rename_source_key(key, [], [], *place)
        return name, pattern

    def converter(self, pattern: str) -> WeightConverter:
        """The converter that a pattern is of."""
        # the loader, too, keeps the last one of a pattern
        return next(c for c in reversed(self._converters) if pattern in c.source_patterns)


def _targets(first: str, converter: WeightConverter) -> list[str]:
    """Parameters that a converter makes, by the first of them, which its loader names it after."""
    start, *others = converter.target_patterns
    return [first, *(first.replace(start, other) for other in others)]


def _later(fetch: Callable[[str], Tensor], key: str) -> Any:
    # typed as a future, but called where it is none, which leaves the reading to the conversion
    return lambda: fetch(key)
