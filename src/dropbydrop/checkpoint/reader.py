"""Read a checkpoint: what is there, what it costs, whether it is intact, and its tensors.

Three depths of checking, each cheap enough for its moment:
- `open` parses config and manifest, compares the size of model.safetensors with the manifest and
  its header with the config (names, dtypes, shapes), and looks at the values of the codebooks,
  whose ranges native code relies on. No plane is touched.
- `require(P)`, and every read, does the same for the files of its planes. Exchanged plane files
  are found here, without hashing, because tensor names carry the number of the plane.
- `verify` hashes every file. A flipped bit inside a tensor is found only here.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from dropbydrop.coding.codebook_set import SETS, CodebookSet
from dropbydrop.coding.rotation import Rotation, split_odd
from dropbydrop.system.digest import file_digest
from dropbydrop.system.errors import FormatError, MissingPlaneError

from .config import (
    CONFIG_FILE,
    MANIFEST_FILE,
    RESERVED_PREFIXES,
    REST_FILE,
    QuantizationConfig,
    codebook_name,
    codes_name,
    input_scales_name,
    odd_name,
)
from .files import Manifest, dump_json, read_json
from .tensor_files import TensorInfo, read_header


@dataclass(frozen=True)
class Finding:
    """A problem that `Checkpoint.verify` found. kind: "missing", "size", "header" or "hash"."""

    file: str
    kind: str
    message: str

    def __str__(self) -> str:
        return self.message


class Checkpoint:
    """An opened checkpoint folder; immutable, safe to share between threads.

    Attributes:
        path: the folder.
        config: config.json as a dict.
        quantization: its validated `quantization_config`.
        manifest: the validated manifest.
    """

    def __init__(self, folder: Path) -> None:
        """See `open`."""
        if not folder.is_dir():
            raise FormatError(
                f"{folder} is not a folder. Checkpoints are local folders; fetch one from the Hub "
                "first (hf download REPO --local-dir FOLDER)."
            )
        config = read_json(folder / CONFIG_FILE)
        if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
            raise FormatError(
                f"{folder / CONFIG_FILE} has no quantization_config: this is not a dropbydrop "
                "checkpoint. Make one with: dropbydrop quantize MODEL OUT --bits 2,3,4"
            )
        if "auto_map" in config:
            raise FormatError(
                f"{folder / CONFIG_FILE} has 'auto_map', which asks to run code from the "
                "checkpoint. dropbydrop checkpoints never carry code; do not use this one."
            )
        self.path, self.config = folder, config
        self.quantization = QuantizationConfig.from_dict(config["quantization_config"])
        self.manifest = Manifest.from_dict(read_json(folder / MANIFEST_FILE))
        listed, described = len(self.manifest.planes), len(self.quantization.planes)
        if listed != described:
            raise FormatError(
                f"{folder}: the manifest lists {listed} planes, the config {described}: files of "
                "two checkpoints are mixed. Fetch it again."
            )
        self._lock = threading.Lock()
        self._handles: dict[str, Any] = {}
        self._checked: set[int] = set()
        self._check_rest()

    @staticmethod
    def open(path: Path | str) -> Checkpoint:
        """Open and validate a folder without touching its planes.

        Raises:
            FormatError: not a checkpoint of this version, or damaged; the message says which file
                is concerned and what to do.
        """
        return Checkpoint(Path(path))

    # -- what is there --------------------------------------------------------------------

    @property
    def levels(self) -> tuple[int, ...]:
        """The precisions P that can be asked for."""
        return self.quantization.levels

    def planes_present(self) -> tuple[int, ...]:
        """Planes whose files are all in the folder (their contents are not looked at)."""
        return tuple(
            m
            for m, names in enumerate(self.manifest.planes, 1)
            if all((self.path / name).is_file() for name in names)
        )

    def plane_paths(self, m: int) -> tuple[Path, ...]:
        """Files of plane m, whether present or not."""
        return tuple(self.path / name for name in self.manifest.planes[m - 1])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Quantized module -> (d_out, d_in)."""
        return {
            module: (self.rest[f"{module}.scales"].shape[0], group.d_in)
            for group in self.quantization.input_groups
            for module in group.modules
        }

    @cached_property
    def rest(self) -> dict[str, TensorInfo]:
        """Header of model.safetensors."""
        self._check_size(REST_FILE)
        return read_header(self.path / REST_FILE)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of a checkpoint, whichever of its planes are present: SHA-256 (hex) of its
        manifest's canonical form."""
        return hashlib.sha256(dump_json(self.manifest.to_dict())).hexdigest()

    # -- what it costs --------------------------------------------------------------------

    def bytes_at(self, bits: int) -> int:
        """Bytes of the files that precision `bits` reads: its planes and model.safetensors.

        Raises:
            PrecisionError: not a level.
        """
        prefix = self.quantization.prefix_of(bits)
        return sum(self.manifest.files[name].size for name in self.manifest.tensor_files(prefix))

    def true_bits(self, bits: int) -> float:
        """Bits a weight of the quantized linears at precision `bits`, everything counted.

        8 * bytes(codes and codebooks of its planes, one scale row a matrix, input scales,
        odd factors) / sum(d_out * d_in).

        Raises:
            PrecisionError: not a level.
        """
        q = self.quantization
        planes = q.planes[: q.prefix_of(bits)]
        weights = sum(d_out * d_in for d_out, d_in in self.shapes.values())
        total = sum(p.nbytes(*shape) for p in planes for shape in self.shapes.values())
        total += sum(2 * d_out for d_out, _ in self.shapes.values())
        total += len(q.sets) * sum(p.codebook_bytes for p in planes)
        total += sum(
            info.nbytes
            for name, info in self.rest.items()
            if name.startswith(("input_groups.", "rotations."))
        )
        return 8 * total / weights

    def true_bits_whole(self, bits: int) -> float:
        """Bits a parameter of the whole model: 8 * bytes_at(bits) / original parameters."""
        return 8 * self.bytes_at(bits) / self.manifest.total_parameters

    # -- reading --------------------------------------------------------------------------

    def require(self, bits: int) -> int:
        """Check that precision `bits` is a level and that its planes are present and plausible.

        Returns:
            The level.

        Raises:
            PrecisionError: not a level.
            MissingPlaneError: a plane is absent.
            FormatError: a plane is cut off, damaged, or in the wrong file.
        """
        self.require_planes(self.quantization.prefix_of(bits))
        return bits

    def require_planes(self, prefix: int) -> None:
        """Check that the first `prefix` planes are present and plausible.

        Raises:
            MissingPlaneError, FormatError: as `require`.
        """
        for m in range(1, prefix + 1):
            self._check_plane(m)

    def read_codes(self, module: str, m: int) -> Tensor:
        """Codes of plane m of a quantized linear: uint8, of the shape that the plane gives it.

        Raises:
            MissingPlaneError, FormatError: as `require`.
            KeyError: `module` is not quantized.
        """
        if module not in self.shapes or not 1 <= m <= len(self.manifest.planes):
            raise KeyError(f"plane {m} of {module}")
        self._check_plane(m)
        name = codes_name(module, m)
        for file in self.manifest.planes[m - 1]:
            handle = self._handle(file)
            if name in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        raise AssertionError(name)  # _check_plane has seen it

    def read(self, name: str) -> Tensor:
        """A tensor of model.safetensors (KeyError if there is none of this name)."""
        if name not in self.rest:
            raise KeyError(name)
        tensor: Tensor = self._handle(REST_FILE).get_tensor(name)
        return tensor

    def read_set(self, name: str) -> CodebookSet:
        """A codebook set, as it is stored.

        Raises:
            FormatError: values that no codebook has (`open` has looked at all sets).
        """
        planes = self.quantization.planes
        parts = tuple(
            {suffix: self.read(codebook_name(name, m, suffix)) for suffix in plane.parts}
            for m, plane in enumerate(planes, 1)
        )
        books = SETS[self.quantization.kind](planes, parts)
        if problems := list(books.problems()):
            raise FormatError(
                f"{self.path / REST_FILE}: codebook set {name!r} is damaged: "
                f"{'; '.join(problems)}. Fetch it again."
            )
        return books

    def read_rotation(self, index: int) -> Rotation:
        """The rotation of input group `index`."""
        group = self.quantization.input_groups[index]
        odd = split_odd(group.d_in)[1]
        factor = self.read(odd_name(odd)) if odd > 1 else None
        scales = self.read(input_scales_name(index))
        return Rotation.from_stored(group.d_in, scales, factor)

    # -- checking -------------------------------------------------------------------------

    def verify(self, hashes: bool = True) -> list[Finding]:
        """Check every file that is present against the manifest; absent planes are no problem.

        Args:
            hashes: also compare SHA-256, which reads everything once.

        Returns:
            The problems, in the order of the manifest; empty when all is well.
        """
        findings = []
        planes = set(self.manifest.tensor_files()) - {REST_FILE}
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                if name not in planes:
                    findings.append(Finding(name, "missing", f"{path} is missing. Fetch it again."))
                continue
            size = path.stat().st_size
            if size != entry.size:
                text = f"{size} bytes, the manifest says {entry.size}: cut off, or edited."
                findings.append(Finding(name, "size", f"{path} has {text}"))
            elif hashes and (found := file_digest(path)) != entry.sha256:
                text = f"SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…: damaged or "
                findings.append(Finding(name, "hash", f"{path} has {text}edited. Fetch it again."))
        suspect = {finding.file for finding in findings}
        for m in self.planes_present():
            if not suspect.intersection(self.manifest.planes[m - 1]):
                try:
                    self._check_plane(m)
                except FormatError as error:
                    findings.append(Finding(self.manifest.planes[m - 1][0], "header", str(error)))
        return findings

    def _check_size(self, name: str) -> None:
        path, entry = self.path / name, self.manifest.files[name]
        if not path.is_file():
            raise FormatError(f"{path} is missing. Fetch it again; every precision needs it.")
        if path.stat().st_size != entry.size:
            raise FormatError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.size}: cut off, "
                "or from another checkpoint. Fetch it again."
            )

    def _check_rest(self) -> None:
        """Everything the config implies must be in model.safetensors, in dtype and shape."""
        problems = list(self._rest_problems())
        if problems:
            raise FormatError(
                f"{self.path / REST_FILE} contradicts {CONFIG_FILE}: {'; '.join(problems[:4])}"
                f"{' …' if len(problems) > 4 else ''}. Files of two checkpoints mixed, or damaged; "
                "fetch it again."
            )
        for name in self.quantization.sets:
            self.read_set(name)

    def _rest_problems(self) -> Iterator[str]:
        rest, q = self.rest, self.quantization
        expected = {name: TensorInfo("F16", (0,)) for name in q.guards}
        expected |= q.codebooks
        for i, group in enumerate(q.input_groups):
            odd = split_odd(group.d_in)[1]
            expected[input_scales_name(i)] = TensorInfo("U8", (group.d_in,))
            if odd > 1:
                expected[odd_name(odd)] = TensorInfo("F32", (odd, odd))
        ours = {name for name in rest if name.startswith(RESERVED_PREFIXES)}
        for name in sorted(ours - set(expected)):
            yield f"{name} is not described"
        for module in q.modules:
            shape = rest[f"{module}.scales"].shape[:1] if f"{module}.scales" in rest else ()
            expected[f"{module}.scales"] = TensorInfo("F16", shape or (0,))
        if q.embeddings.bits == 8:
            for module in q.embeddings.modules:
                rows = rest[f"{module}.rows"].shape if f"{module}.rows" in rest else (0, 0)
                expected[f"{module}.rows"] = TensorInfo("I8", rows)
                expected[f"{module}.row_scales"] = TensorInfo("F16", rows[:1])
        for name, info in expected.items():
            if name not in rest:
                yield f"{name} is missing"
            elif rest[name] != info:
                yield f"{name} is {rest[name]}, expected {info}"

    def _check_plane(self, m: int) -> None:
        """Presence, sizes and headers of the files of plane m; once per Checkpoint."""
        if m in self._checked:
            return
        for path in self.plane_paths(m):
            if not path.is_file():
                present = ", ".join(map(str, self.planes_present())) or "none"
                raise MissingPlaneError(
                    f"plane {m} is needed, but {path} is missing (complete planes here: {present})."
                    f" Fetch this file, or ask for a lower precision."
                )
            self._check_size(path.name)
        found = {n: info for p in self.plane_paths(m) for n, info in read_header(p).items()}
        plane = self.quantization.planes[m - 1]
        expected = {
            codes_name(module, m): TensorInfo("U8", plane.shape(*matrix))
            for module, matrix in self.shapes.items()
        }
        if found != expected:
            name = min(set(found) ^ set(expected), default=None)
            if name is None:
                name = min(n for n in expected if expected[n] != found[n])
            raise FormatError(
                f"{self.plane_paths(m)[0]} does not hold plane {m} of this checkpoint: {name} is "
                f"{found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}. "
                "Files were exchanged or renamed, or belong to another checkpoint; fetch it again."
            )
        self._checked.add(m)

    def _handle(self, file: str) -> Any:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = safe_open(self.path / file, framework="pt")
            return self._handles[file]
