"""What a nested checkpoint consists of: names, versions, and the validated form of its JSON.

A checkpoint is a Hugging Face folder. `plane-m.safetensors` holds the codes of plane m,
`model.safetensors` everything else, `config.json` the description (`quantization_config`),
`manifest.json` the size and SHA-256 of every file. The full specification is docs/format.md.

This module is pure: name builders and dataclasses with `from_dict`/`to_dict`; it opens no file.
`files.py` beside it has the manifest and the safetensors header.

Strictness: an unknown version, an unknown key or a contradiction raises `FormatError`. A reader
that guesses would decode wrong weights without a sign of it. Free-form is `provenance` alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.errors import FormatError, PrecisionError

FORMAT = "dropbydrop"
FORMAT_VERSION = 1  # of everything but a config with scaled rotations
SCALED_VERSION = 2  # of a config with at least one scaled rotation
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
REST_FILE = "model.safetensors"
CARD_FILE = "README.md"  # the model card
LOG_FILE = "quantize-log.jsonl"  # one line a matrix
RESERVED_PREFIXES = ("codebooks.", "sites.", "rotations.")  # tensor names that are ours alone
SIGNPOST = "import_dropbydrop_before_loading"  # a tensor whose name tells others what to do
LEVELS_SUFFIX = ".levels"  # `<parameter>.levels`: one variant of an ordinary parameter per level

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


# ---------------------------------------------------------------------------------- names


def codes_name(module: str, m: int) -> str:
    """Tensor of plane m of a quantized linear: uint8 [d_out, G]."""
    return f"{module}.codes.{m}"


def codebook_name(set_name: str, m: int) -> str:
    """Tensor of codebook m of a set: float16 [K/2 or K, g]."""
    return f"codebooks.{set_name}.{m}"


def signs_name(input_group: int) -> str:
    """Packed signs of input group i: uint8 [ceil(d_in / 8)]."""
    return f"sites.{input_group}.signs"


def inputs_name(input_group: int) -> str:
    """Signs and factors of the inputs of an input group with a scaled rotation: uint8 [d_in]."""
    return f"sites.{input_group}.inputs"


def odd_name(odd: int) -> str:
    """The orthogonal factor shared by all input groups with this odd factor: float32 [odd, odd]."""
    return f"rotations.odd{odd}"


def plain_name(name: object, where: str) -> str:
    """A file name without any path in it.

    Raises:
        FormatError: it could leave the folder, or is no name at all.
    """
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or ".." in name:
        raise FormatError(
            f"{where} names the file {name!r}; only plain file names are allowed (letters, digits, "
            "'.', '_', '-'), because a path could leave the folder. Do not use this checkpoint."
        )
    return name


# ------------------------------------------------------------------------- strict parsing


class Fields:
    """Takes typed values out of a JSON object and refuses what is left over."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise FormatError(f"{where} is {type(data).__name__}, not a JSON object: damaged file.")
        self.data, self.where = dict(data), where

    def take(self, key: str, kind: type, **default: Any) -> Any:
        """The value of `key`, which must have type `kind`; `default=` makes it optional."""
        if key not in self.data:
            if "default" in default:
                return default["default"]
            raise FormatError(f"{self.where} lacks {key!r}: damaged, or not one of ours.")
        value = self.data.pop(key)
        # JSON true is an int in Python; never let it pass as a number.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{self.where}: {key!r} is {value!r}; expected {kind.__name__}.")
        return value

    def done(self) -> None:
        """Every key must have been taken."""
        if self.data:
            raise FormatError(
                f"{self.where} has unknown keys {sorted(self.data)}; they may change what "
                "the codes mean. Written by a newer version? Upgrade dropbydrop."
            )


def _strings(values: Sequence[Any], where: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str) or not _TENSOR_NAME.fullmatch(value):
            raise FormatError(f"{where}: {value!r} is not a module name. The config is damaged.")
    return tuple(values)


def check_version(version: object, where: str, known: Sequence[int] = (FORMAT_VERSION,)) -> None:
    """Raises FormatError unless `version` is one of the `known` ones."""
    if version not in known or isinstance(version, bool):
        raise FormatError(
            f"{where} has format_version {version!r}; this dropbydrop reads version "
            f"{' and '.join(map(str, known))}. Upgrade dropbydrop, or fetch a checkpoint of that "
            "version."
        )


# --------------------------------------------------------------------- quantization_config


@dataclass(frozen=True)
class PlaneSpec:
    """One plane: K entries of g inputs, one code of `dtype` a group. Version 1 knows one kind."""

    entries: int = ENTRIES
    group: int = GROUP
    dtype: str = "uint8"
    sign_symmetric: bool = True

    def __post_init__(self) -> None:
        if (self.entries, self.group, self.dtype) != (ENTRIES, GROUP, "uint8"):
            raise FormatError(
                f"plane of {self.entries} entries, group {self.group}, dtype {self.dtype}; this "
                f"version decodes {ENTRIES} entries, group {GROUP}, uint8. Upgrade dropbydrop."
            )

    @property
    def stored_entries(self) -> int:
        """Rows of the codebook on disk: half when the code's top bit is the sign."""
        return self.entries // 2 if self.sign_symmetric else self.entries

    @staticmethod
    def from_dict(data: object, where: str = "plane") -> PlaneSpec:
        """Raises FormatError naming what is unknown."""
        fields = Fields(data, where)
        spec = PlaneSpec(
            fields.take("entries", int),
            fields.take("group", int),
            fields.take("dtype", str),
            fields.take("sign_symmetric", bool),
        )
        fields.done()
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "entries": self.entries,
            "group": self.group,
            "dtype": self.dtype,
            "sign_symmetric": self.sign_symmetric,
        }


@dataclass(frozen=True)
class StoredGroup:
    """Matrices that read the same input x: they share its rotation and their codebook set."""

    name: str
    modules: tuple[str, ...]
    d_in: int
    codebooks: str = "universal"
    rotation: Mapping[str, Any] = field(default_factory=lambda: {"kind": "full"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))
        where = f"site {self.name!r}"
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise FormatError(f"{where} lists modules {self.modules}: none, or one twice.")
        _strings((*self.modules, self.codebooks), where)
        if self.d_in < GROUP or self.d_in % GROUP:
            raise FormatError(f"{where}: d_in {self.d_in} is not a multiple of the group {GROUP}.")
        self._check_rotation(where)

    def _check_rotation(self, where: str) -> None:
        rotation = dict(self.rotation)
        kind, block = rotation.pop("kind", None), rotation.pop("block", None)
        if rotation.pop("scaled", True) is not True:
            raise FormatError(f"{where}: rotation 'scaled' is true or not there.")
        if kind == "none" and "scaled" in self.rotation:
            raise FormatError(f"{where}: a rotation of kind 'none' cannot be scaled.")
        if kind not in ("full", "block", "none") or rotation:
            raise FormatError(
                f"{where}: rotation {dict(self.rotation)!r} is unknown to this version. "
                "Upgrade dropbydrop."
            )
        if (kind == "block") != (block is not None):
            raise FormatError(f"{where}: 'block' belongs to kind 'block', found {kind!r}.")
        if block is not None and (
            type(block) is not int or block < 1 or block & (block - 1) or self.d_in % block
        ):
            raise FormatError(f"{where}: rotation block {block!r} does not divide {self.d_in}.")

    @staticmethod
    def from_dict(data: object, where: str = "site") -> StoredGroup:
        """Raises FormatError naming what is unknown or contradictory."""
        fields = Fields(data, where)
        spec = StoredGroup(
            fields.take("name", str),
            _strings(fields.take("modules", list), where),
            fields.take("d_in", int),
            fields.take("codebooks", str),
            fields.take("rotation", dict),
        )
        fields.done()
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "modules": list(self.modules),
            "d_in": self.d_in,
            "codebooks": self.codebooks,
            "rotation": dict(self.rotation),
        }


@dataclass(frozen=True)
class Embeddings:
    """Embedding (and untied head) modules: int8 rows with a scale each, or plain 16-bit weights."""

    bits: int
    modules: tuple[str, ...]
    tied: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", _strings(self.modules, "embeddings"))
        if self.bits not in (8, 16):
            raise FormatError(f"embeddings of {self.bits} bits; this version reads 8 and 16.")

    @staticmethod
    def from_dict(data: object, where: str = "embeddings") -> Embeddings:
        """Raises FormatError naming what is unknown."""
        fields = Fields(data, where)
        spec = Embeddings(
            fields.take("bits", int), tuple(fields.take("modules", list)), fields.take("tied", bool)
        )
        fields.done()
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"bits": self.bits, "modules": list(self.modules), "tied": self.tied}


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization_config` of config.json.

    Attributes:
        bits: precision that is loaded when none is asked for.
        levels: supervised prefixes P, ascending; the only precisions that can be asked for.
        planes: one spec a plane; the last level is their number.
        input groups: input groups; their order is the index i of `input_groups.<i>.signs` and
            `.inputs`.
        provenance: free-form (base model, calibration, seed, weights of the levels, version).
    """

    bits: int
    levels: tuple[int, ...]
    planes: tuple[PlaneSpec, ...]
    input_groups: tuple[StoredGroup, ...]
    embeddings: Embeddings
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("levels", "planes", "input_groups"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        count = len(self.planes)
        if (
            not self.levels
            or any(type(level) is not int for level in self.levels)
            or list(self.levels) != sorted(set(self.levels))
            or self.levels[0] < 1
            or self.levels[-1] != count
        ):
            raise FormatError(
                f"levels {list(self.levels)} contradict {count} planes: they must ascend from at "
                "least 1, and the last level is the number of planes."
            )
        if not self.input_groups:
            raise FormatError("quantization_config lists no input groups: nothing is quantized.")
        for what, names in (
            ("module", [m for input_group in self.input_groups for m in input_group.modules]),
            ("site", [input_group.name for input_group in self.input_groups]),
        ):
            double = sorted(name for name, count in Counter(names).items() if count > 1)
            if double:
                raise FormatError(f"{what} {double} appears more than once in the sites.")
        both = {m for input_group in self.input_groups for m in input_group.modules} & set(
            self.embeddings.modules
        )
        if both:
            raise FormatError(f"{sorted(both)} are listed as quantized linears and as embeddings.")
        self.check_level(self.bits)

    def check_level(self, bits: object) -> int:
        """`bits` if it is a level of this checkpoint.

        Raises:
            PrecisionError: it is not; the message lists the levels.
        """
        if type(bits) is int and bits in self.levels:
            return bits
        raise PrecisionError(
            f"precision {bits!r} is not a level of this checkpoint; it has "
            f"{', '.join(map(str, self.levels))}. Ask for one of these, or quantize again with it."
        )

    @property
    def format_version(self) -> int:
        """The version that a reader needs."""
        scaled = any("scaled" in input_group.rotation for input_group in self.input_groups)
        return SCALED_VERSION if scaled else FORMAT_VERSION

    @cached_property
    def group_index(self) -> dict[str, int]:
        """Quantized module -> index of its site."""
        return {
            module: i
            for i, input_group in enumerate(self.input_groups)
            for module in input_group.modules
        }

    @property
    def modules(self) -> tuple[str, ...]:
        """All quantized modules in the order of the input groups, which is that of the tensors."""
        return tuple(module for input_group in self.input_groups for module in input_group.modules)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the codebook sets in use, in order of first use."""
        return tuple(dict.fromkeys(input_group.codebooks for input_group in self.input_groups))

    @property
    def guards(self) -> tuple[str, str]:
        """Empty tensors that stop loaders which do not know this format (docs/format.md)."""
        return f"{self.input_groups[0].modules[0]}.weight", SIGNPOST

    @staticmethod
    def from_dict(data: object, where: str = "quantization_config") -> QuantizationConfig:
        """Parse and validate.

        Raises:
            FormatError: not ours, unknown version, unknown keys, contradictions.
            PrecisionError: the default `bits` is not a level.
        """
        fields = Fields(data, where)
        if fields.data.pop("quant_method", None) != FORMAT:
            raise FormatError(f"{where}: quant_method is not {FORMAT!r}. Not one of our folders.")
        version = fields.data.pop("format_version", None)
        check_version(version, where, (FORMAT_VERSION, SCALED_VERSION))
        planes = fields.take("planes", list)
        input_groups = fields.take("sites", list)
        config = QuantizationConfig(
            fields.take("bits", int),
            tuple(fields.take("levels", list)),
            tuple(PlaneSpec.from_dict(p, f"{where}: plane {m}") for m, p in enumerate(planes, 1)),
            tuple(
                StoredGroup.from_dict(s, f"{where}: input group {i}")
                for i, s in enumerate(input_groups)
            ),
            Embeddings.from_dict(fields.take("embeddings", dict), f"{where}: embeddings"),
            fields.take("provenance", dict, default={}),
        )
        fields.done()
        if version != config.format_version:
            raise FormatError(
                f"{where}: format_version {version} with{'' if version == 1 else 'out'} scaled "
                f"rotations, which is version {config.format_version}. Damaged or edited; fetch it "
                "again."
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "quant_method": FORMAT,
            "format_version": self.format_version,
            "bits": self.bits,
            "levels": list(self.levels),
            "planes": [plane.to_dict() for plane in self.planes],
            "sites": [input_group.to_dict() for input_group in self.input_groups],
            "embeddings": self.embeddings.to_dict(),
            "provenance": dict(self.provenance),
        }


def is_checkpoint(folder: Path) -> bool:
    """Whether the config of a folder names our format."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        return bool(config["quantization_config"]["quant_method"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False
