"""Read a checkpoint: what is there, what it costs, whether it is intact, and its tensors.

Four depths of checking, each cheap enough for its moment:
- `open` parses config and manifest, compares the contents of config.json and the size of
  model.safetensors with the manifest and the header of the latter with the config (names, types,
  shapes), and looks at the values of the codebooks, whose ranges native code relies on. No plane is
  touched.
- `require(P)`, and every read, does the same for the files of its planes. Exchanged plane files
  are found here, without hashing, because tensor names carry the number of the plane.
- A tensor that is read is compared with the manifest's XXH128 of its bytes (checked_file.py), and
  `check_contents(P)` compares all files that decide the model at P bits: what loads or exports a
  level calls it first.
- `verify` computes SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import math
import threading
from functools import cached_property
from pathlib import Path

from torch import Tensor

from dropbydrop.coding.codebook_set import SETS, CodebookSet
from dropbydrop.coding.rotation import Rotation, split_odd
from dropbydrop.system.errors import FormatError, MissingPlaneError
from dropbydrop.system.paths import given

from .checked_file import CheckedFile
from .config import (
    CONFIG_FILE,
    MANIFEST_FILE,
    REST_FILE,
    QuantizationConfig,
    codebook_name,
    codes_name,
    input_scales_name,
    odd_name,
)
from .contents import (
    check_model_config,
    is_document,
    is_read_by_others,
    plane_tensors,
    rest_problems,
    value_problem,
)
from .fields import parse_json
from .files import Manifest, dump_json, read_small
from .findings import Finding, file_findings
from .tensor_files import TensorInfo


class Checkpoint:
    """An opened checkpoint folder; immutable, safe to share between threads.

    Attributes:
        path: the folder.
        config: config.json as a dict.
        quantization: its validated `quantization_config`.
        manifest: the validated manifest.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """See `open`."""
        if not folder.is_dir():
            raise FormatError(
                f"{folder} is not a folder. Checkpoints are local folders; fetch one from the Hub "
                "first (hf download REPO --local-dir FOLDER)."
            )
        config = parse_json(raw := read_small(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
            raise FormatError(
                f"{folder / CONFIG_FILE} has no quantization_config: this is not a dropbydrop "
                "checkpoint. Make one with: dropbydrop quantize MODEL OUT --bits 2,3,4"
            )
        check_model_config(config, str(folder / CONFIG_FILE))
        self.path, self.config, self._verify = folder, config, verify
        self.quantization = QuantizationConfig.from_dict(config["quantization_config"])
        self._listed = read_small(folder / MANIFEST_FILE)
        self.manifest = Manifest.from_dict(parse_json(self._listed, f"{folder}/{MANIFEST_FILE}"))
        listed, described = len(self.manifest.planes), len(self.quantization.planes)
        if listed != described:
            raise FormatError(
                f"{folder}: the manifest lists {listed} planes, the config {described}: files of "
                "two checkpoints are mixed. Fetch it again."
            )
        self._lock = threading.RLock()
        self._files: dict[str, CheckedFile] = {}
        self._checked: set[int] = set()
        if verify:
            self._check_config(raw)
        self._check_rest()

    @staticmethod
    def open(path: Path | str, verify: bool = True) -> Checkpoint:
        """Open and validate a folder without touching its planes.

        Args:
            verify: compare what is read, now and later, with the hashes of the manifest.

        Raises:
            FormatError: not a checkpoint of this version, or damaged; the message says which file
                is concerned and what to do.
        """
        return Checkpoint(given(path), verify)

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Quantized module -> (d_out, d_in), or (E, d_out, d_in) of a stack of experts."""
        return {
            module: (*self.rest[f"{module}.scales"].shape, group.d_in)
            for group in self.quantization.input_groups
            for module in group.modules
        }

    @cached_property
    def rest(self) -> dict[str, TensorInfo]:
        """Header of model.safetensors."""
        return self._file(REST_FILE).header.tensors

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

        8 * bytes(codes and codebooks of its planes, one scale row a matrix, input scales, odd
        factors) / sum(d_out * d_in) of all matrices.

        Raises:
            PrecisionError: not a level.
        """
        q = self.quantization
        planes = q.planes[: q.prefix_of(bits)]
        shapes = self.shapes.values()
        total = sum(p.nbytes(*shape) for p in planes for shape in shapes)
        total += sum(2 * math.prod(shape[:-1]) for shape in shapes)
        total += len(q.sets) * sum(p.codebook_bytes for p in planes)
        total += sum(
            info.nbytes
            for name, info in self.rest.items()
            if name.startswith(("input_groups.", "rotations."))
        )
        return 8 * total / sum(map(math.prod, shapes))

    def true_bits_whole(self, bits: int) -> float:
        """8 * bytes_at(bits) / parameters of the original model."""
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

    def read_codes(self, module: str, m: int, expert: int | None = None) -> Tensor:
        """Codes of plane m of a quantized module, or of one expert of a stack: uint8.

        Raises:
            MissingPlaneError, FormatError: as `require`.
            KeyError: `module` is not quantized.
        """
        if module not in self.shapes or not 1 <= m <= len(self.manifest.planes):
            raise KeyError(f"plane {m} of {module}")
        return self.read_plane(m, codes_name(module, m), expert)

    def read_plane(self, m: int, name: str, row: int | None = None) -> Tensor:
        """A tensor that plane m must hold, or a row of it; raises as `require`."""
        self._check_plane(m)
        for file in map(self._file, self.manifest.planes[m - 1]):
            if name in file.header.tensors:
                return file.tensor(name, row)
        raise AssertionError(name)  # _check_plane has seen it

    def read(self, name: str) -> Tensor:
        """A tensor of model.safetensors, on the mapped file.

        Raises:
            KeyError: there is none of this name.
            FormatError: its bytes are not those of the manifest.
        """
        return self._file(REST_FILE).tensor(name)

    def read_set(self, name: str) -> CodebookSet:
        """A codebook set, as it is stored, in memory.

        Raises:
            FormatError: values that no codebook has (`open` has looked at all sets).
        """
        q = self.quantization
        planes = q.embeddings.planes if name == q.embeddings.codebooks else q.planes
        parts = tuple(
            {suffix: self.read(codebook_name(name, m, suffix)).clone() for suffix in plane.parts}
            for m, plane in enumerate(planes, 1)
        )
        books = SETS[planes[0].kind](planes, parts)
        if problems := list(books.problems()):
            raise FormatError(
                f"{self.path / REST_FILE}: codebook set {name!r} is damaged: "
                f"{'; '.join(problems)}. Fetch it again."
            )
        return books

    def read_rotation(self, index: int) -> Rotation:
        """The rotation of input group `index`, in memory."""
        group = self.quantization.input_groups[index]
        odd = split_odd(group.d_in)[1]
        factor = self.read(odd_name(odd)).clone() if odd > 1 else None
        scales = self.read(input_scales_name(index))
        return Rotation.from_stored(group.d_in, scales, factor)

    # -- checking -------------------------------------------------------------------------

    def check_contents(self, prefix: int) -> None:
        """Compare all that decides the model of the first `prefix` planes with the manifest.

        These are its planes, model.safetensors, and every other file but documents. Further files
        that loaders of models would read must not lie beside them. Contents are left out of a
        checkpoint that was opened without `verify`; values that are not finite are refused always.

        Raises:
            MissingPlaneError, FormatError: a plane is absent; a file is missing, damaged, edited,
                or not of this checkpoint.
        """
        self.require_planes(prefix)
        if self._verify:
            planes = set(self.manifest.tensor_files())
            texts = (n for n in self.manifest.files if n not in planes and not is_document(n))
            for name in (*texts, *self.manifest.tensor_files(prefix)):
                self._file(name).check()
            self._check_strangers()
        for name in (n for n, info in self.rest.items() if info.dtype != "U8"):
            if problem := value_problem(name, self.read(name)):
                raise FormatError(
                    f"{self.path / REST_FILE}: {problem}. It was damaged, or made so; fetch it "
                    "again, or quantize again."
                )

    def unchanged(self) -> None:
        """Raises FormatError unless the folder still holds the files that were opened.

        For whoever has read them by their names meanwhile.
        """
        for file in tuple(self._files.values()):
            file.unchanged()

    def verify(self, hashes: bool = True) -> list[Finding]:
        """Check every file that is present against the manifest; absent planes are no problem.

        Args:
            hashes: also compare SHA-256 and XXH128, which reads everything.

        Returns:
            The problems, in the order of the manifest; empty when all is well.
        """
        findings = file_findings(self.path, self.manifest, hashes)
        suspect = {finding.file for finding in findings}
        for m in self.planes_present():
            if not suspect.intersection(self.manifest.planes[m - 1]):
                try:
                    self._check_plane(m)
                except FormatError as error:
                    findings.append(Finding(self.manifest.planes[m - 1][0], "header", str(error)))
        return findings

    def _check_config(self, raw: bytes) -> None:
        """The bytes that were parsed must be those that the manifest lists."""
        file = self._file(CONFIG_FILE) if CONFIG_FILE in self.manifest.files else None
        if file is None or file.content != raw:
            raise FormatError(
                f"{self.path / CONFIG_FILE} is not in the manifest, or was replaced while it was "
                "read. Fetch the checkpoint again."
            )
        file.check()

    def _check_strangers(self) -> None:
        """No file that loaders would read beside those that the manifest lists."""
        present = {path.name for path in self.path.iterdir()}
        strangers = sorted(filter(is_read_by_others, present - set(self.manifest.files)))
        if strangers:
            raise FormatError(
                f"{self.path} holds {strangers[0]!r}, which its manifest does not list, and which "
                "loaders of models read: it would change the model. Move it away, or load with "
                "verify=False if it is yours."
            )

    def _check_rest(self) -> None:
        """Everything the config implies must be in model.safetensors, in dtype and shape."""
        problems = list(rest_problems(self.quantization, self.rest))
        if not problems:
            counted = self.manifest.quantized_parameters
            if (weights := sum(map(math.prod, self.shapes.values()))) != counted:
                problems.append(f"{weights} quantized weights, the manifest says {counted}")
        if problems:
            raise FormatError(
                f"{self.path / REST_FILE} contradicts {CONFIG_FILE}: {'; '.join(problems[:4])}"
                f"{' …' if len(problems) > 4 else ''}. Files of two checkpoints mixed, or damaged; "
                "fetch it again."
            )
        q = self.quantization
        for name in (*q.sets, *([q.embeddings.codebooks] if q.tables else [])):
            self.read_set(name)

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
        headers = [self._file(name).header for name in self.manifest.planes[m - 1]]
        found = {n: info for header in headers for n, info in header.tensors.items()}
        expected = plane_tensors(self.quantization, self.shapes, self.rest, m)
        if found != expected or sum(len(header.tensors) for header in headers) != len(found):
            name = min(set(found) ^ set(expected), default=None)
            if name is None:
                name = next((n for n in sorted(expected) if expected[n] != found[n]), min(found))
            raise FormatError(
                f"{self.plane_paths(m)[0]} does not hold plane {m} of this checkpoint: {name} is "
                f"{found.get(name, 'missing')}, expected {expected.get(name, 'no such tensor')}. "
                "Files were exchanged or renamed, or belong to another checkpoint; fetch it again."
            )
        self._checked.add(m)

    def _file(self, name: str) -> CheckedFile:
        """A file of the manifest, opened once and for as long as this checkpoint is in use."""
        with self._lock:
            if name not in self._files:
                opened = CheckedFile(self.path / name, self.manifest.files[name], self._verify)
                if not self._verify and name in self.manifest.tensor_files():
                    self.check_manifest()
                self._files[name] = opened
            return self._files[name]

    def check_manifest(self) -> None:
        """The folder must still be that of this manifest; where contents are compared, they say."""
        if read_small(self.path / MANIFEST_FILE) != self._listed:
            raise FormatError(
                f"{self.path} holds another checkpoint than the one that was opened: it was "
                "replaced meanwhile. Load the folder again."
            )
