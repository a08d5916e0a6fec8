"""What is wrong with the files of a folder, all of it: `dropbydrop info` lists it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dropbydrop.system.digest import FileEntry, chunk_digests, file_digest

from .config import REST_FILE
from .files import Manifest


@dataclass(frozen=True)
class Finding:
    """A problem that `Checkpoint.verify` found. kind: "missing", "size", "header" or "hash"."""

    file: str
    kind: str
    message: str

    def __str__(self) -> str:
        return self.message


def file_findings(folder: Path, manifest: Manifest, hashes: bool) -> list[Finding]:
    """Every file of a manifest against its size and, with `hashes`, its digests; planes may be
    absent."""
    findings: list[Finding] = []
    planes = set(manifest.tensor_files()) - {REST_FILE}
    for name, entry in manifest.files.items():
        if (folder / name).is_file():
            findings += _compare(folder / name, entry, hashes)
        elif name not in planes:
            message = f"{folder / name} is missing. Fetch it again."
            findings.append(Finding(name, "missing", message))
    return findings


def _compare(path: Path, entry: FileEntry, hashes: bool) -> Iterator[Finding]:
    """What is wrong with a file that is there."""
    name = path.name
    try:
        if (size := path.stat().st_size) != entry.size:
            text = f"{size} bytes, the manifest says {entry.size}: cut off, or edited."
            yield Finding(name, "size", f"{path} has {text}")
        elif hashes and (found := file_digest(path)) != entry.sha256:
            text = f"SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…: damaged or "
            yield Finding(name, "hash", f"{path} has {text}edited. Fetch it again.")
        elif hashes and entry.xxh128 not in (None, chunk_digests(path)):
            text = "the SHA-256 of the manifest, but not its XXH128: the manifest is damaged. "
            yield Finding(name, "hash", f"{path} has {text}Fetch it again.")
    except OSError as error:
        yield Finding(name, "hash", f"{path} cannot be read ({error}). Fetch it again.")
