"""Fetch a checkpoint at a precision, piece by piece, into a folder that may hold a lower one.

What P bits need is everything but the planes behind theirs. The manifest stays as it is, so the
result is an ordinary partial checkpoint, and a later `pull --bits 4` adds the planes that lack.

    1. manifest.json first. It is the root of trust: names (plain ones only, no code, no pickles),
       sizes, hashes.
    2. small files, model.safetensors, plane 1, plane 2, ...: what is needed first comes first, so
       that `load(..., upgrade=True)` can begin while the rest is on its way.
    3. each file into `<name>.part`, hashed as it is written, renamed when size and SHA-256 are
       those of the manifest. A broken transfer leaves the .part; the next pull goes on from its
       end. A wrong hash removes it.

In DEST, a file under its own name is therefore always a verified one, after a power cut too: files
and their names are synced. The model card alone may be edited after publication (docs/format.md,
section 5): an edited one at the source is reported and not fetched, one in DEST is kept; any other
file that differs is fetched again. One pull at a time works on a folder (its lock); readers may use
it meanwhile. Symbolic links in DEST are refused: what is written goes into DEST and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dropbydrop.system.atomic_folder import (
    is_partial,
    refuse_work_on,
    remove,
    sync,
    sync_folder,
    write_whole,
)
from dropbydrop.system.console import progress_bar
from dropbydrop.system.digest import FileEntry, file_digest
from dropbydrop.system.errors import FormatError
from dropbydrop.system.file_errors import file_errors
from dropbydrop.system.locks import is_locked, lock
from dropbydrop.system.paths import absolute

from . import Checkpoint, Manifest, QuantizationConfig
from .config import CARD_FILE, CONFIG_FILE, MANIFEST_FILE
from .fields import parse_json
from .files import PART, SIDECARS, read_json
from .origins import CutError, FolderOrigin, Origin, TransferError, origin
from .slice import MAX_TEXT, Transfer, differs, files_for, is_tensors

T = TypeVar("T")

STAGING = ".pull-staging"
_MAX_MANIFEST = 16 << 20
_PAUSE = 0.5  # seconds before another attempt


def pull(
    source: Path | str,
    dest: Path | str,
    bits: int | None = None,
    *,
    revision: str | None = None,
    attempts: int = 3,
    progress: bool = True,
    from_origin: Origin | None = None,
) -> Transfer:
    """Fetch what precision `bits` needs into `dest`; what is there and intact is not fetched again.

    Args:
        source: http(s) address of a folder, local folder, or hub id.
        bits: a level; by default the one that the checkpoint's config names.
        revision: of a hub repository.
        attempts: how often a file is tried when the connection breaks, each time from where it
            broke.
        from_origin: fetch from this instead of `source` (for other kinds of server).

    Raises:
        TransferError: nothing there, a broken connection, wrong sizes or hashes. Finished files
            and the part of a broken one stay for the next pull; damaged bytes do not.
        FormatError: the source is no checkpoint, or `dest` holds another one.
        PrecisionError: `bits` is not a level.
    """
    target = absolute(dest)
    here = from_origin or origin(source, target / STAGING, revision)
    if not target.parent.is_dir():
        raise TransferError(f"{target.parent} is not a folder; create it first.")
    if isinstance(here, FolderOrigin) and here.folder.resolve() == target.resolve():
        raise TransferError(f"source and destination are the same folder, {target}.")
    advice = "What has arrived is kept: run the command again to go on from there."
    with file_errors(target, advice):
        _check_dest(target, None)
        with _lock(target):
            raw = here.read(MANIFEST_FILE, _MAX_MANIFEST)
            if raw is None:
                raise FormatError(
                    f"{here.name} has no {MANIFEST_FILE}: not a dropbydrop checkpoint. Check the "
                    "address, or make one with: dropbydrop quantize MODEL OUT --bits 2,3,4"
                )
            where = f"{MANIFEST_FILE} of {here.name}"
            manifest = Manifest.from_dict(parse_json(raw, where), where)
            config = here.read(CONFIG_FILE, MAX_TEXT)
            if config is None:
                raise FormatError(f"{here.name} has no {CONFIG_FILE}: an incomplete checkpoint.")
            level, prefix = _level(parse_json(config, f"{CONFIG_FILE} of {here.name}"), bits)
            names = files_for(manifest, prefix)
            _check_dest(target, manifest)
            run = _Pull(here, manifest, Transfer(target, level), attempts)
            run.check_space(names)
            if not (target / MANIFEST_FILE).is_file():
                write_whole(target / MANIFEST_FILE, raw)
            return run.run(names, progress)


class _Pull:
    """One run of `pull` on a locked folder."""

    def __init__(self, here: Origin, manifest: Manifest, done: Transfer, attempts: int) -> None:
        self.here, self.manifest, self.done, self.attempts = here, manifest, done, attempts
        self.target = done.path

    def run(self, names: list[str], progress: bool) -> Transfer:
        """Fetch these files."""
        total = sum(self.manifest.files[name].size for name in names)
        with progress_bar(progress) as bar:
            task = bar.add_task("pull (MB)", total=total / 1e6)
            for name in names:
                bar.update(task, description=f"{name} (MB)")
                self._file(name, lambda n: bar.advance(task, n / 1e6))
        for name in SIDECARS:
            with suppress(TransferError):  # nobody needs them; whoever reads them checks them
                data = None if (self.target / name).exists() else self.here.read(name, MAX_TEXT)
                if data is not None:
                    write_whole(self.target / name, data)
        Checkpoint.open(self.target).require(self.done.bits)
        return self.done

    def check_space(self, names: list[str]) -> None:
        """Raises TransferError if the disk has no room for what is missing of these files."""
        missing = 0
        for name in names:
            have = [self.target / name, self.target / (name + PART)]
            there = max((path.stat().st_size for path in have if path.is_file()), default=0)
            missing += max(0, self.manifest.files[name].size - there)
        free = shutil.disk_usage(self.target).free
        if missing > free:
            raise TransferError(
                f"{self.done.bits} bits need {missing / 1e9:.2f} GB more, but {self.target} has "
                f"{free / 1e9:.2f} GB free. Free some space, or ask for fewer bits."
            )

    def _file(self, name: str, advance: Callable[[int], None]) -> None:
        entry, final = self.manifest.files[name], self.target / name
        if final.is_file():
            intact = final.stat().st_size == entry.size and file_digest(final) == entry.sha256
            if intact or name == CARD_FILE:  # a card that somebody edited here is theirs
                self.done.kept.append(name)
                self.done.edited += [] if intact else [name]
                advance(entry.size)
                return
        if is_tensors(name):
            self._tensors(name, entry, final, advance)
        elif not self._text(name, entry, final):
            self.done.edited.append(name)
            return advance(entry.size)
        else:
            advance(entry.size)
        self.done.fetched.append(name)

    def _text(self, name: str, entry: FileEntry, final: Path) -> bool:
        """Whether a small file was written: a card that was edited at the source is not."""
        found = ""
        for _ in range(min(2, self.attempts)):  # a cut body is not always announced
            data = self._again(lambda: self.here.read(name, MAX_TEXT))
            if data is None:
                raise TransferError(f"{self.here.name} lacks {name}, which its manifest lists.")
            self.done.bytes += len(data)
            found = hashlib.sha256(data).hexdigest()
            if found == entry.sha256:
                write_whole(final, data)
                return True
        if name == CARD_FILE:
            return False
        raise differs(f"{name} from {self.here.name}", found, entry)

    def _tensors(
        self, name: str, entry: FileEntry, final: Path, advance: Callable[[int], None]
    ) -> None:
        part = final.with_name(name + PART)
        if part.is_file() and part.stat().st_size > entry.size:
            part.unlink()
        begun = part.stat().st_size if part.is_file() else 0
        advance(begun)
        found = self._again(lambda: self._receive(name, entry, part, advance))
        if found != entry.sha256 and begun:
            # The beginning was left by another run and may be what is wrong: once more, whole.
            part.unlink()
            begun = 0
            found = self._again(lambda: self._receive(name, entry, part, lambda _: None))
        if found != entry.sha256:
            part.unlink()
            raise differs(f"{name} from {self.here.name}", found, entry)
        self.done.resumed += begun
        os.replace(part, final)
        sync_folder(self.target)

    def _receive(
        self, name: str, entry: FileEntry, part: Path, advance: Callable[[int], None]
    ) -> str:
        """Bring `part` to its full size; returns its SHA-256."""
        start = part.stat().st_size if part.is_file() else 0
        digest = hashlib.sha256()
        if start:
            with open(part, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        if start == entry.size:
            return digest.hexdigest()
        stream = self.here.open(name, start, entry.size)
        if stream.start != start:  # a server without ranges begins again
            start, digest = 0, hashlib.sha256()
        with open(part, "ab" if start else "wb", opener=_no_links) as file:
            for chunk in stream.chunks:
                if start + len(chunk) > entry.size:
                    file.close()
                    part.unlink()
                    raise TransferError(
                        f"{name} from {self.here.name} does not end at the {entry.size:,} bytes "
                        "that the manifest says. Nothing of it was kept; tell whoever serves it."
                    )
                file.write(chunk)
                digest.update(chunk)
                start += len(chunk)
                self.done.bytes += len(chunk)
                advance(len(chunk))
            sync(file)
        if start < entry.size:
            raise CutError(
                f"{name} ended after {start:,} of {entry.size:,} bytes. Run the command again to "
                "go on from there."
            )
        return digest.hexdigest()

    def _again(self, attempt: Callable[[], T]) -> T:
        for left in range(self.attempts - 1, -1, -1):
            try:
                return attempt()
            except CutError:
                if not left:
                    raise
                time.sleep(_PAUSE)
        raise AssertionError("attempts must be at least 1")


# ------------------------------------------------------------------------------------ folder


def _no_links(path: str, flags: int) -> int:
    """Opens a file, but no symbolic link (ELOOP)."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the folder's lock; a folder that was created for it and stayed empty is removed."""
    created = not target.exists()
    busy = TransferError(f"another pull into {target} is running; wait until it is done.")
    descriptor = lock(target, busy)
    try:
        refuse_work_on(target)  # of a run that will replace what is fetched here
        if created:
            sync_folder(target.parent)
        for path in target.iterdir():
            if is_partial(path.name):  # of a pull that was killed
                path.unlink()
        yield
    finally:
        try:
            remove(target / STAGING)
            if created and target.is_dir() and not any(target.iterdir()):
                target.rmdir()
        finally:
            os.close(descriptor)


def is_pulling(folder: Path) -> bool:
    """Whether a `pull` into this folder is running at this moment."""
    return is_locked(folder)


def _check_dest(target: Path, manifest: Manifest | None) -> None:
    """`target` must be absent, empty, or a (partial) copy of the same checkpoint."""
    if target.is_symlink():
        raise TransferError(f"{target} is a symbolic link; name the folder that it points to.")
    if not target.exists():
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else {""}
    if links := sorted(name for name in names if (target / name).is_symlink()):
        raise TransferError(
            f"{target} holds a symbolic link, {links[0]}; files are fetched into this folder "
            "itself only. Remove the link, or choose another folder."
        )
    if all(name == STAGING or is_partial(name) for name in names):
        return
    if MANIFEST_FILE not in names:
        raise TransferError(
            f"{target} exists and is no dropbydrop checkpoint; choose another name."
        )
    if manifest and Manifest.from_dict(read_json(target / MANIFEST_FILE)) != manifest:
        raise FormatError(
            f"{target} holds another checkpoint (its manifest differs). Nothing was changed; "
            "choose another folder, or remove it yourself."
        )


def _level(config: object, bits: int | None) -> tuple[int, int]:
    """The level that was asked for, and the number of its planes."""
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    parsed = QuantizationConfig.from_dict(quantization)
    level = parsed.check_level(parsed.bits if bits is None else bits)
    return level, parsed.prefix_of(level)
