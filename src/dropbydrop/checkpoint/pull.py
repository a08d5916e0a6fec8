"""Fetch a checkpoint at a precision, piece by piece, into a folder that may hold a lower one.

What P bits need is everything but the planes behind theirs. The manifest stays as it is, so the
result is an ordinary partial checkpoint, and a later `pull --bits 4` adds the planes that lack.

    1. manifest.json first. It is the root of trust: names (plain ones only), sizes, hashes.
    2. small files, model.safetensors, plane 1, plane 2, ...: what is needed first comes first, so
       that `load(..., upgrade=True)` can begin while the rest is on its way.
    3. each file into `<name>.part`, hashed as it is written, renamed when size and SHA-256 are
       those of the manifest. A broken transfer leaves the .part; the next pull goes on from its
       end. A wrong hash removes it.

In DEST, a file under its own name is therefore always a verified one. Text files may be edited
after publication (docs/format.md, section 5): they are kept and reported when they differ.
One pull at a time works on a folder (`.pull.lock`); readers may use it meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dropbydrop.system.atomic_folder import is_locked, lock, sync, write_whole
from dropbydrop.system.console import progress_bar
from dropbydrop.system.digest import FileEntry, file_digest
from dropbydrop.system.errors import FormatError

from . import Checkpoint, Manifest, QuantizationConfig
from .config import CONFIG_FILE, MANIFEST_FILE
from .files import read_json
from .origins import CutError, FolderOrigin, Origin, TransferError, origin
from .slice import MAX_TEXT, SIDECARS, Transfer, differs, files_for, is_tensors

T = TypeVar("T")

LOCK_FILE = ".pull.lock"
STAGING = ".pull-staging"
_PART = ".part"
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
    target = Path(os.path.abspath(dest))
    here = from_origin or origin(source, target / STAGING, revision)
    if not target.parent.is_dir():
        raise TransferError(f"{target.parent} is not a folder; create it first.")
    created = not target.exists()
    if isinstance(here, FolderOrigin) and here.folder.resolve() == target.resolve():
        raise TransferError(f"source and destination are the same folder, {target}.")
    try:
        raw = here.read(MANIFEST_FILE, _MAX_MANIFEST)
        if raw is None:
            raise FormatError(
                f"{here.name} has no {MANIFEST_FILE}: not a dropbydrop checkpoint. Check the "
                "address, or make one with: dropbydrop quantize MODEL OUT --bits 2,3,4"
            )
        manifest = Manifest.from_dict(_parse(raw, here.name), f"{MANIFEST_FILE} of {here.name}")
        config = here.read(CONFIG_FILE, MAX_TEXT)
        if config is None:
            raise FormatError(f"{here.name} has no {CONFIG_FILE}: an incomplete checkpoint.")
        level, prefix = _level(_parse(config, here.name), bits)
        _check_dest(target, manifest)
        target.mkdir(exist_ok=True)
        with _lock(target):
            _check_dest(target, manifest)  # another pull may have begun in between
            if not (target / MANIFEST_FILE).is_file():
                write_whole(target / MANIFEST_FILE, raw)
            created = False
            run = _Pull(here, manifest, Transfer(target, level), attempts)
            return run.run(prefix, progress)
    finally:
        shutil.rmtree(target / STAGING, ignore_errors=True)
        if created and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


class _Pull:
    """One run of `pull` on a locked folder."""

    def __init__(self, here: Origin, manifest: Manifest, done: Transfer, attempts: int) -> None:
        self.here, self.manifest, self.done, self.attempts = here, manifest, done, attempts
        self.target = done.path

    def run(self, prefix: int, progress: bool) -> Transfer:
        names = files_for(self.manifest, prefix)
        self._check_space(names)
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

    def _check_space(self, names: list[str]) -> None:
        missing = 0
        for name in names:
            have = [self.target / name, self.target / (name + _PART)]
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
            if intact or not is_tensors(name):  # a text edited, here or there, stays as it is here
                self.done.kept.append(name)
                self.done.edited += [] if intact else [name]
                advance(entry.size)
                return
        fetch = self._tensors if is_tensors(name) else self._text
        fetch(name, entry, final, advance)
        self.done.fetched.append(name)

    def _text(
        self, name: str, entry: FileEntry, final: Path, advance: Callable[[int], None]
    ) -> None:
        data = self._again(lambda: self.here.read(name, MAX_TEXT))
        if data is None:
            raise TransferError(f"{self.here.name} lacks {name}, which its manifest lists.")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            self.done.edited.append(name)
        write_whole(final, data)
        self.done.bytes += len(data)
        advance(len(data))

    def _tensors(
        self, name: str, entry: FileEntry, final: Path, advance: Callable[[int], None]
    ) -> None:
        part = final.with_name(name + _PART)
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
        with open(part, "ab" if start else "wb") as file:
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


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the folder's lock; refuse while another process pulls into it."""
    path = target / LOCK_FILE
    busy = TransferError(f"another pull into {target} is running; wait until it is done.")
    descriptor = lock(path, busy, folder=False)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_pulling(folder: Path) -> bool:
    """Whether a `pull` into this folder is running at this moment."""
    return is_locked(folder / LOCK_FILE)


def _check_dest(target: Path, manifest: Manifest) -> None:
    """`target` must be absent, empty, or a (partial) copy of the same checkpoint."""
    if not target.exists():
        return
    names = {p.name for p in target.iterdir()} - {LOCK_FILE, STAGING} if target.is_dir() else {""}
    if names and MANIFEST_FILE not in names:
        raise TransferError(
            f"{target} exists and is no dropbydrop checkpoint; choose another name."
        )
    if names and Manifest.from_dict(read_json(target / MANIFEST_FILE)) != manifest:
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


def _parse(raw: bytes, name: str) -> object:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise FormatError(f"{name}: not JSON ({error}); not a dropbydrop checkpoint.") from error
