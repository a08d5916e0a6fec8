"""What every method hands back for one matrix: decoded weights, and what they cost.

Bytes are those of a file that a runtime of the method would read, everything counted: codes,
scales, zero points, tables, codebooks, signs. Two kinds of method serve several levels:

    nested      one file; level P reads a part of it. On disk: the one file
    dedicated   one file a level. On disk: all of them

What a checkpoint stores once, whatever the number of its matrices (universal codebooks), is not
here; the registry in `__init__` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """What methods that treat matrices by their place need to know of the model.

    Attributes:
        family: model_type of its text config, as GGUF files call it where they know it.
        blocks, blocks_name: number of decoder blocks, and the name of their list ("model.layers").
        heads, kv_heads: attention heads, and those of keys and values.
        modules: every matrix that can be coded: its name and [d_out, d_in].
    """

    family: str
    blocks: int
    blocks_name: str
    heads: int
    kv_heads: int
    modules: tuple[tuple[str, tuple[int, int]], ...]


@dataclass(frozen=True)
class Level:
    """One matrix at one level.

    Attributes:
        weight: decoded, float32 [d_out, d_in], in the space of the original.
        bytes: what has to be read to run this level.
        kind: what the matrix was made into, where a method has several things to make of one.
    """

    weight: Tensor
    bytes: int
    kind: str = ""

    @property
    def true_bits(self) -> float:
        """Bits a weight, everything counted."""
        return 8 * self.bytes / self.weight.numel()


@dataclass(frozen=True)
class Suite:
    """One matrix at all the levels that a method serves.

    Attributes:
        levels: P -> the matrix at level P.
        files: bytes on disk of each checkpoint that the suite needs: one of a nested method, one a
            level of a dedicated one.
    """

    levels: Mapping[int, Level]
    files: tuple[int, ...]

    @property
    def stored(self) -> int:
        """Bytes on disk to serve every level."""
        return sum(self.files)


def dedicated(levels: Mapping[int, Level]) -> Suite:
    """A suite of independent checkpoints, one a level."""
    return Suite(levels, tuple(level.bytes for level in levels.values()))


def bit_bytes(values: int, bits: int) -> int:
    """Bytes of `values` integers of `bits` bits, packed."""
    return -(-values * bits // 8)
