"""What a nested checkpoint consists of: names, versions, and the validated form of its JSON.

docs/format.md is the specification. This module is pure: name builders and dataclasses with
`from_dict`/`to_dict`; it opens no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.planes import PlaneSpec, counts_of
from dropbydrop.models.input_groups import InputGroup
from dropbydrop.system.errors import FormatError, PrecisionError

from .embeddings import MAX_PLANES, Embeddings, parse_plane
from .fields import FORMAT_VERSION, Fields, check_version, module_names
from .tensor_files import TensorInfo

FORMAT = "dropbydrop"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
REST_FILE = "model.safetensors"
CARD_FILE = "README.md"  # the model card
LOG_FILE = "quantize-log.jsonl"  # one line a matrix
RESERVED_PREFIXES = ("codebooks.", "input_groups.", "rotations.")  # of our tensors alone
LAYOUTS = ("fused", "fused-transposed")  # of stacks of experts in the original model
SIGNPOST = "call_dropbydrop_register_before_loading"  # an empty tensor: tells what to do


# ---------------------------------------------------------------------------------- names


def codes_name(module: str, m: int) -> str:
    """Tensor of plane m of a quantized linear: uint8, of the shape that the plane gives it."""
    return f"{module}.codes.{m}"


def codebook_name(set_name: str, m: int, suffix: str = "") -> str:
    """Tensor of codebook m of a set, or of one of its parts (`PlaneSpec.parts`)."""
    return f"codebooks.{set_name}.{m}{suffix}"


def input_scales_name(index: int) -> str:
    """Signs and scales of the inputs of input group i: uint8 [d_in]."""
    return f"input_groups.{index}.input_scales"


def table_inputs_name(module: str) -> str:
    """Signs and scales of the inputs of a table in planes: uint8 [d]."""
    return f"{module}.input_scales"


def odd_name(odd: int) -> str:
    """The orthogonal factor shared by all input groups with this odd factor: float32 [odd, odd]."""
    return f"rotations.odd{odd}"


# --------------------------------------------------------------------- quantization_config


def _unknown_stack(where: str, experts: int, layout: str) -> FormatError:
    return FormatError(
        f"{where}: {experts} experts of layout {layout!r} are unknown to this version, which reads "
        f"1 or more of layout {' or '.join(LAYOUTS)}. Upgrade dropbydrop."
    )


@dataclass(frozen=True)
class StoredGroup(InputGroup):
    """An input group and the codebook set that it is stored with.

    The index of a group in the config is the i of `input_groups.<i>.input_scales`.

    Attributes:
        layout: how the original model keeps a stack of experts, one of `LAYOUTS`: as [E, d_out,
            d_in], as codes are ("fused"), or as [E, d_in, d_out] ("fused-transposed"). Only an
            export reads it.
    """

    codebooks: str = "universal"
    layout: str = LAYOUTS[0]

    def __post_init__(self) -> None:
        where = f"input group {self.name!r}"
        object.__setattr__(self, "modules", module_names(self.modules, where))
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise FormatError(f"{where} lists modules {self.modules}: none, or one twice.")
        module_names([self.codebooks], where)
        if self.d_in < GROUP or self.d_in % GROUP:
            raise FormatError(f"{where}: d_in {self.d_in} is not a multiple of the group {GROUP}.")
        if self.experts < 0 or self.layout not in LAYOUTS:
            raise _unknown_stack(where, self.experts, self.layout)

    @staticmethod
    def from_dict(data: object, where: str = "input group") -> StoredGroup:
        """Raises FormatError naming what is unknown or contradictory."""
        given = Fields(data, where)
        stack = {"experts": int, "layout": str} if "experts" in given.data else {}
        values = given.exactly(
            name=str, modules=list, d_in=int, codebooks=str, rotation=dict, **stack
        )
        if stack and values["experts"] < 1:
            raise _unknown_stack(where, values["experts"], values["layout"])
        rotation = Fields(values.pop("rotation"), f"{where}: rotation")
        kind = rotation.take("kind", str)
        if kind != "full":
            raise FormatError(
                f"{where}: rotation {kind!r} is unknown to this version. Upgrade dropbydrop."
            )
        rotation.done()
        return StoredGroup(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        found = asdict(self) | {"modules": list(self.modules), "rotation": {"kind": "full"}}
        if not self.experts:
            del found["experts"], found["layout"]
        return found


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization_config` of config.json.

    Attributes:
        bits: precision that is loaded when none is asked for.
        levels: supervised levels P, bits a weight, ascending; the only precisions that can be
            asked for. Level P reads the first planes, as many as have P bits together.
        planes: one spec a plane, all of one kind.
        input_groups: matrices that read the same input, in the order of the model.
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
        if len({plane.kind for plane in self.planes}) != 1:
            raise FormatError(
                f"planes of kinds {[plane.kind for plane in self.planes]}: a checkpoint has planes "
                "of one kind. The config is damaged."
            )
        if len(self.planes) > MAX_PLANES:
            raise FormatError(
                f"{len(self.planes)} planes; kernels read up to {MAX_PLANES}. The config is "
                "damaged."
            )
        counts_of(self.planes, self.levels)
        if self.embeddings.by_level:
            self._check_tables()
        if not self.input_groups:
            raise FormatError("quantization_config lists no input groups: nothing is quantized.")
        for what, names in (
            ("module", self.modules),
            ("input group", [group.name for group in self.input_groups]),
        ):
            double = sorted(name for name, count in Counter(names).items() if count > 1)
            if double:
                raise FormatError(f"{what} {double} appears more than once in the input groups.")
        tables = self.embeddings.modules
        if len(set(tables)) != len(tables):
            raise FormatError(
                f"embeddings lists modules {tables}: one twice. The config is damaged."
            )
        if reserved := [n for n in (*self.modules, *tables) if n.startswith(RESERVED_PREFIXES)]:
            raise FormatError(
                f"module {reserved[0]!r} begins with a prefix that is reserved for our tensors. "
                "The config is damaged."
            )
        if both := set(self.modules) & set(self.embeddings.modules):
            raise FormatError(f"{sorted(both)} are listed as quantized linears and as embeddings.")
        self.check_level(self.bits)

    def _check_tables(self) -> None:
        bits, name = list(self.embeddings.by_level), self.embeddings.codebooks
        if len(bits) != len(self.levels):
            raise FormatError(
                f"embeddings of {bits} bits for the levels {list(self.levels)}: one for each is "
                "needed. The config is damaged."
            )
        if name in (group.codebooks for group in self.input_groups):
            raise FormatError(
                f"embeddings and an input group share the codebook set {name!r}. The config is "
                "damaged."
            )

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
    def kind(self) -> str:
        """Kind of its planes."""
        return self.planes[0].kind

    @cached_property
    def _counts(self) -> dict[int, int]:
        return dict(zip(self.levels, counts_of(self.planes, self.levels), strict=True))

    def prefix_of(self, level: int) -> int:
        """Number of planes that a level reads (PrecisionError: not a level)."""
        return self._counts[self.check_level(level)]

    def level_of(self, prefix: int) -> int:
        """The highest level that the first `prefix` planes serve; they must serve one."""
        return self.served_by(prefix)[-1]

    def served_by(self, prefix: int) -> tuple[int, ...]:
        """The levels that read no more than the first `prefix` planes."""
        return tuple(level for level in self.levels if self._counts[level] <= prefix)

    def table_prefix(self, prefix: int) -> int:
        """Planes of a table in planes that lie in the first `prefix` plane files."""
        pairs = zip(self.levels, self.embeddings.counts, strict=False)
        return max((count for level, count in pairs if self._counts[level] <= prefix), default=0)

    def table_bits(self, prefix: int) -> int:
        """Bits a weight of these; 0 without tables in planes."""
        return sum(plane.bits for plane in self.embeddings.planes[: self.table_prefix(prefix)])

    @property
    def table_files(self) -> tuple[int, ...]:
        """The number of the plane file that holds each plane of a table in planes."""
        return self.embeddings.files([self._counts[level] for level in self.levels])

    @property
    def tables(self) -> tuple[str, ...]:
        """Embedding and head, if they are in planes."""
        return self.embeddings.modules if self.embeddings.by_level else ()

    @cached_property
    def group_index(self) -> dict[str, int]:
        """Quantized module -> index of its input group."""
        groups = enumerate(self.input_groups)
        return {module: i for i, group in groups for module in group.modules}

    @property
    def modules(self) -> tuple[str, ...]:
        """All quantized modules in the order of the input groups, which is that of the tensors."""
        return tuple(module for group in self.input_groups for module in group.modules)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the codebook sets in use, in order of first use."""
        return tuple(dict.fromkeys(group.codebooks for group in self.input_groups))

    @property
    def codebooks(self) -> dict[str, TensorInfo]:
        """Every tensor of the codebook sets: its type and shape."""
        sets = [(name, self.planes) for name in self.sets]
        return {
            codebook_name(name, m, suffix): TensorInfo(*part)
            for name, planes in [*sets, (self.embeddings.codebooks, self.embeddings.planes)]
            for m, plane in enumerate(planes, 1)
            for suffix, part in plane.parts.items()
        }

    @property
    def guards(self) -> tuple[str, str]:
        """Empty tensors that stop loaders which do not know this format (docs/format.md)."""
        first = self.input_groups[0]
        return first.modules[0] + ("" if first.experts else ".weight"), SIGNPOST

    @staticmethod
    def from_dict(data: object, where: str = "quantization_config") -> QuantizationConfig:
        """Parse and validate.

        Raises:
            FormatError: not ours, unknown version, unknown keys, contradictions.
            PrecisionError: the default `bits` is not a level.
        """
        found = Fields(data, where)
        if found.data.pop("quant_method", None) != FORMAT:
            raise FormatError(f"{where}: quant_method is not {FORMAT!r}. Not one of our folders.")
        check_version(found.data.pop("format_version", None), where)
        provenance = found.take("provenance", dict, default={})
        values = found.exactly(
            bits=int, levels=list, planes=list, input_groups=list, embeddings=dict
        )
        planes, groups = enumerate(values["planes"], 1), enumerate(values["input_groups"])
        return QuantizationConfig(
            values["bits"],
            tuple(values["levels"]),
            tuple(parse_plane(plane, f"{where}: plane {m}") for m, plane in planes),
            tuple(StoredGroup.from_dict(s, f"{where}: input group {i}") for i, s in groups),
            Embeddings.from_dict(values["embeddings"], f"{where}: embeddings"),
            provenance,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "quant_method": FORMAT,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "levels": list(self.levels),
            "planes": [plane.to_dict() for plane in self.planes],
            "input_groups": [group.to_dict() for group in self.input_groups],
            "embeddings": self.embeddings.to_dict(),
            "provenance": dict(self.provenance),
        }
