"""Which matrices of a checkpoint a layer of vLLM holds.

vLLM merges linears that read the same input (q, k and v; gate and up) into one layer, and some of
its models have other names than those of transformers, which a checkpoint uses. An input group of
a checkpoint is just such a merged layer: one rotation, one set of codebooks, rows below each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dropbydrop.checkpoint import QuantizationConfig
from dropbydrop.system.errors import UnsupportedModelError


class Names:
    """Names of quantized modules and embeddings in vLLM -> names in the checkpoint."""

    def __init__(self, quantization: QuantizationConfig) -> None:
        """Args: quantization: of the checkpoint, whose names are those of transformers."""
        self._quantization = quantization
        names = [*quantization.modules, *quantization.embeddings.modules]
        self._stored = {name: name for name in names}
        self._taken: set[str] = set()

    def rename(self, mapped: Callable[[str], str | None]) -> None:
        """Follow a renaming of vLLM's; None is what this class of vLLM leaves out."""
        renamed = {mapped(name): stored for name, stored in self._stored.items()}
        self._stored = {name: stored for name, stored in renamed.items() if name is not None}

    def embedding(self, prefix: str) -> str | None:
        """The stored name of an embedding or head; None if vLLM's layer is not in the checkpoint.

        Some of vLLM's models give their embedding no name; it is the first one of the checkpoint.
        """
        tables = self._quantization.embeddings.modules
        stored = self._stored.get(prefix) if prefix else tables[0]
        return stored if stored in tables else None

    def linear(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> tuple[str, ...] | None:
        """The stored modules whose rows a linear layer holds, in their order; None if it is dense.

        Args:
            prefix: full name of vLLM's layer.
            packed: last part of the name of a merged layer -> those that it was merged from.

        Raises:
            UnsupportedModelError: only some of them are quantized, or they do not read one
                input.
        """
        parent, dot, leaf = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in packed.get(leaf, [leaf])]
        index = self._quantization.group_index
        found = {part: name for part in parts if (name := self._stored.get(part)) in index}
        if not found:
            return None
        if len(found) < len(parts):
            raise UnsupportedModelError(
                f"vLLM merges {parts} into {prefix}, of which the checkpoint has only "
                f"{sorted(found)} quantized. Serve this model with: dropbydrop serve."
            )
        stored = tuple(found.values())
        if len({index[name] for name in stored}) > 1:
            raise UnsupportedModelError(
                f"vLLM merges {list(stored)} into {prefix}, which do not share an input group in "
                "the checkpoint. Serve this model with: dropbydrop serve."
            )
        self._taken.update(stored)
        return stored

    def left(self) -> list[str]:
        """Quantized modules that no layer of vLLM has asked for."""
        return [name for name in self._quantization.modules if name not in self._taken]
