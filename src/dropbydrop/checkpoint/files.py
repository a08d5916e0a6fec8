"""`manifest.json`, which lists every file of a checkpoint, and how JSON is read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropbydrop.system.atomic_folder import is_partial
from dropbydrop.system.digest import CHUNK, FileEntry
from dropbydrop.system.errors import DropError, FormatError
from dropbydrop.system.paths import regular

from .config import CONFIG_FILE, FORMAT, MANIFEST_FILE, REST_FILE
from .fields import FORMAT_VERSION, Fields, check_version, parse_json, plain_name

SIDECARS = ("sensitivity.json",)  # measured later, not in the manifest; copied when there
REFUSED_SUFFIXES = (  # no text of a checkpoint ends like this: code, pickles, other tensors
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py",
)  # fmt: skip
PART = ".part"  # a file that `pull` has not finished
MAX_JSON = 16 << 20  # bytes; 100,000 modules take 12 MB
_SHA256, _XXH128 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")


def plane_file(m: int, shard: int = 1, shards: int = 1) -> str:
    """File of plane m, or of one of its shards (counted from 1)."""
    suffix = "" if shards == 1 else f"-{shard:05d}-of-{shards:05d}"
    return f"plane-{m}{suffix}.safetensors"


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FormatError: missing, unreadable, too large, or not JSON (`parse_json`).
    """
    return parse_json(read_small(path), str(path))


def read_small(path: Path) -> bytes:
    """The bytes of a text file, whose size is looked at first.

    Raises:
        FormatError: missing, unreadable, or larger than any that a checkpoint has.
    """
    try:
        with open(path, "rb", opener=regular) as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError:
        raise FormatError(
            f"{path} does not exist: not a dropbydrop checkpoint, or an incomplete copy of one "
            "(hf download REPO --local-dir FOLDER fetches a whole one from the Hub)."
        ) from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error}). Fetch it again.") from error
    if len(data) > MAX_JSON:
        raise FormatError(
            f"{path} has more than {MAX_JSON:,} bytes, which no such file of a checkpoint needs: "
            "damaged, or made to use up memory. Fetch it again."
        )
    return data


def dump_json(data: Any) -> bytes:
    """The one JSON form that is written: sorted keys, two spaces, final newline, UTF-8."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def is_checkpoint(folder: Path) -> bool:
    """Whether the config of a folder names our format."""
    try:
        quantization = read_json(folder / CONFIG_FILE)["quantization_config"]
        return bool(quantization["quant_method"] == FORMAT)
    except (FormatError, KeyError, TypeError):
        return False


def check_replaceable(folder: Path) -> None:
    """Raises DropError unless `folder` is a checkpoint with nothing else in it, which `overwrite`
    may replace."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
        ours = manifest.get("format") == FORMAT
        listed = {*manifest.get("files", {}), MANIFEST_FILE, *SIDECARS}
    except (FormatError, AttributeError, TypeError):
        ours, listed = False, set()
    if not ours:
        raise DropError(
            f"{folder} exists and is not a dropbydrop checkpoint, so it is not overwritten. "
            "Choose another name, or remove it yourself."
        )
    names = sorted(path.name for path in folder.iterdir())
    if others := [n for n in names if n.removesuffix(PART) not in listed and not is_partial(n)]:
        raise DropError(
            f"{folder} holds files that are no part of its checkpoint ({', '.join(others[:4])}"
            f"{', …' if len(others) > 4 else ''}), so it is not overwritten. Move them elsewhere, "
            "or choose another name."
        )


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: every file of the full checkpoint but itself. Written once, never changed.

    Attributes:
        files: name -> size and digests.
        planes: planes[m - 1] are the file names of plane m (several when sharded).
        rest: files that every precision needs: exactly `model.safetensors`.
        quantized_parameters: weights of the quantized linears (d_out * d_in each).
        total_parameters: parameters of the original model, tied ones once.
    """

    files: Mapping[str, FileEntry]
    planes: tuple[tuple[str, ...], ...]
    rest: tuple[str, ...]
    quantized_parameters: int
    total_parameters: int

    def tensor_files(self, prefix: int | None = None) -> list[str]:
        """Files of tensors of the first `prefix` planes, or of all, in the order of need."""
        return [*self.rest, *(name for names in self.planes[:prefix] for name in names)]

    @staticmethod
    def from_dict(data: object, where: str = MANIFEST_FILE) -> Manifest:
        """Parse and validate.

        Raises:
            FormatError: not ours, unknown version, names with a path in them, contradictions.
        """
        fields = Fields(data, where)
        if fields.data.pop("format", None) != FORMAT:
            raise FormatError(f"{where}: format is not {FORMAT!r}. Not one of our folders.")
        check_version(fields.data.pop("format_version", None), where)
        files: dict[str, FileEntry] = {}
        for name, entry in fields.take("files", dict).items():
            files[name] = _entry(entry, f"{where}: {plain_name(name, where)}")
        planes = tuple(
            _plane_names(names, m, where) for m, names in enumerate(fields.take("planes", list), 1)
        )
        rest = tuple(plain_name(name, where) for name in fields.take("rest", list))
        counts = Fields(fields.take("parameters", dict), f"{where}: parameters")
        quantized, total = counts.exactly(quantized=int, total=int).values()
        fields.done()
        if not planes:
            raise FormatError(f"{where} lists no planes: damaged.")
        if rest != (REST_FILE,):
            raise FormatError(f"{where}: rest is {list(rest)}; this version has [{REST_FILE!r}].")
        unlisted = {name for names in (*planes, rest) for name in names} - set(files)
        if unlisted:
            raise FormatError(f"{where}: {sorted(unlisted)} have no size and hash. Damaged.")
        if not 0 < quantized <= total:
            raise FormatError(f"{where}: {quantized} quantized of {total} parameters: damaged.")
        return Manifest(files, planes, rest, quantized, total)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "files": {name: _entry_to_dict(entry) for name, entry in self.files.items()},
            "planes": [list(names) for names in self.planes],
            "rest": list(self.rest),
            "parameters": {"quantized": self.quantized_parameters, "total": self.total_parameters},
        }


def _entry(data: object, where: str) -> FileEntry:
    """Size and digests of a file; checkpoints of the first weeks have no XXH128."""
    fields = Fields(data, where)
    chunks = fields.take("xxh128", list, default=None)
    size, sha256 = fields.exactly(size=int, sha256=str).values()
    if not 0 <= size < 1 << 63 or not _SHA256.fullmatch(sha256):
        raise FormatError(f"{where}: size or sha256 is malformed. Damaged; fetch it again.")
    if chunks is None:
        return FileEntry(size, sha256)
    valid = all(isinstance(chunk, str) and _XXH128.fullmatch(chunk) for chunk in chunks)
    if not valid or len(chunks) != -(-size // CHUNK):
        raise FormatError(
            f"{where}: xxh128 is malformed: one of 32 hex digits for each {CHUNK:,} bytes. "
            "Damaged; fetch it again."
        )
    return FileEntry(size, sha256, tuple(chunks))


def _entry_to_dict(entry: FileEntry) -> dict[str, Any]:
    chunks = {} if entry.xxh128 is None else {"xxh128": list(entry.xxh128)}
    return {"size": entry.size, "sha256": entry.sha256} | chunks


def _plane_names(names: object, m: int, where: str) -> tuple[str, ...]:
    """The files of plane m, which must be exactly the names the format gives them."""
    if not isinstance(names, list) or not names:
        raise FormatError(f"{where}: plane {m} names no files. Damaged.")
    expected = tuple(plane_file(m, i, len(names)) for i in range(1, len(names) + 1))
    found = tuple(plain_name(name, where) for name in names)
    if found != expected:
        raise FormatError(f"{where}: plane {m} is in {list(found)}; expected {list(expected)}.")
    return found
