"""Copy a precision out of a checkpoint folder: everything but the planes that it does not read.

The manifest stays as it is, so the result is an ordinary partial checkpoint. It is written into a
hidden folder that is renamed when every hash was right: all or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.digest import FileEntry
from dropbydrop.system.errors import FormatError
from dropbydrop.system.paths import absolute

from . import Checkpoint, Manifest
from .config import MANIFEST_FILE
from .files import PART, REFUSED_SUFFIXES, SIDECARS, check_replaceable
from .origins import TransferError

_OURS = (MANIFEST_FILE, *SIDECARS)
MAX_TEXT = 256 << 20  # bytes of a text file


@dataclass
class Transfer:
    """What a slice or pull did.

    Attributes:
        path, bits: the folder, and the precision that it can now be loaded at.
        fetched, kept: files that were copied, and that were already there and intact.
        edited: text files that differ from the manifest (edited since; see docs/format.md); those
            that a pull would have to fetch are not.
        bytes: bytes received; resumed: bytes that an earlier, broken transfer had left.
    """

    path: Path
    bits: int
    fetched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    bytes: int = 0
    resumed: int = 0


def files_for(manifest: Manifest, prefix: int) -> list[str]:
    """Files of the first planes in the order of need: text files, model.safetensors, planes.

    Raises:
        FormatError: the manifest lists code, pickles, or names that this package uses itself.
    """
    texts = sorted(set(manifest.files) - set(manifest.tensor_files()))
    for name in texts:
        if name.endswith((*REFUSED_SUFFIXES, PART)) or name.startswith(".") or name in _OURS:
            raise FormatError(
                f"the manifest lists {name}, which is no file of a checkpoint: these hold neither "
                "code nor pickles. Nothing was fetched; do not use this source."
            )
    return [*texts, *manifest.tensor_files(prefix)]


def slice_checkpoint(
    source: Path | str, dest: Path | str, bits: int, *, overwrite: bool = False
) -> Transfer:
    """Write the folder `dest` with what precision `bits` needs of the checkpoint `source`.

    Raises:
        PrecisionError, MissingPlaneError, FormatError: `bits` is no level, a plane is absent, or a
            file differs from the manifest. `dest` is then as it was.
        DropError: `dest` exists or is `source`, or the disk is full.
    """
    checkpoint = Checkpoint.open(source)
    prefix = checkpoint.quantization.prefix_of(checkpoint.require(bits))
    target = absolute(dest)
    if target.resolve() == checkpoint.path.resolve():
        raise TransferError(f"source and destination are the same folder, {target}.")
    done, replace = Transfer(target, bits), check_replaceable if overwrite else None
    with AtomicFolder(target, replace) as folder, folder.disk_errors():
        for name in files_for(checkpoint.manifest, prefix):
            entry = checkpoint.manifest.files[name]
            path = checkpoint.path / name
            if not path.is_file():
                raise FormatError(f"{path} is missing. Fetch it again.")
            folder.copy(name, path)
            if folder.files[name] != entry:
                if is_tensors(name):
                    raise differs(str(path), folder.files[name].sha256, entry)
                done.edited.append(name)
            done.fetched.append(name)
            done.bytes += folder.files[name].size
        for name in (*SIDECARS, MANIFEST_FILE):
            if (checkpoint.path / name).is_file():
                folder.copy(name, checkpoint.path / name)
        checkpoint.check_manifest()  # which was copied last
        folder.publish()
    return done


def is_tensors(name: str) -> bool:
    """Whether a file holds tensors: it must be what the manifest says; a text may be edited."""
    return name.endswith(".safetensors")


def differs(what: str, found: str, entry: FileEntry) -> TransferError:
    """The error of a file with another SHA-256 than the manifest's."""
    return TransferError(
        f"{what} has SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…: damaged, or "
        "not the file of this checkpoint. It was not kept. Try again; if it happens again, the "
        "source itself is damaged."
    )
