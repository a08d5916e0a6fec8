"""Where a checkpoint can be fetched from: a folder, a plain HTTP server, a repository of the Hub.

An origin does two things: read a small file whole, and open a large one at an offset. It knows
nothing of hashes; pull.py verifies whatever comes. What an origin does check is the size that
a server announces, because that is the moment at which nothing has been downloaded yet.

HTTP is urllib with Range requests, so any static file server will do; one that ignores Range is
read from the beginning again. Redirects stay within http and https. The Hub goes through
huggingface_hub, which knows about tokens and mirrors and resumes by itself.
"""

from __future__ import annotations

import http.client
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from dropbydrop.errors import DropError

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte from a server
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


class TransferError(DropError):
    """A file that could not be fetched: absent, cut off, of the wrong size or hash."""


class CutError(TransferError):
    """The connection ended early; trying again may help."""


@dataclass(frozen=True)
class Stream:
    """Bytes of a file from `start` on, which may be before the offset that was asked for."""

    start: int
    chunks: Iterator[bytes]


class Origin(Protocol):
    """What pull.py needs of a source; `name` is for messages."""

    name: str

    def read(self, file: str, limit: int) -> bytes | None:
        """A small file whole, or None if there is none of this name (TransferError)."""

    def open(self, file: str, start: int, size: int) -> Stream:
        """A file of `size` bytes from offset `start` (TransferError)."""

    def close(self) -> None:
        """Remove whatever the origin kept for itself."""


def origin(source: str | Path, staging: Path, revision: str | None = None) -> Origin:
    """The origin that `source` names: http(s) address, local folder, or hub id (owner/name).

    Args:
        staging: a folder that a hub download may create and use; removed by `close`.
        revision: branch, tag or commit of a hub repository.

    Raises:
        TransferError: none of these.
    """
    text = str(source)
    if text.startswith(("http://", "https://")):
        return HttpOrigin(text)
    if Path(source).expanduser().is_dir():
        return FolderOrigin(Path(source).expanduser())
    if _HUB_ID.fullmatch(text):
        return HubOrigin(text, staging, revision)
    raise TransferError(
        f"{text!r} is no folder, no http(s) address and no hub id (owner/name). Check the spelling."
    )


class FolderOrigin:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def read(self, file: str, limit: int) -> bytes | None:
        path = self.folder / file
        if not path.is_file():
            return None
        _check_limit(path.stat().st_size, limit, str(path))
        return path.read_bytes()

    def open(self, file: str, start: int, size: int) -> Stream:
        path = self.folder / file
        if not path.is_file():
            raise _absent(self.name, file)
        _check_announced(path.stat().st_size, size, str(path))
        return Stream(start, _file_chunks(path, start))

    def close(self) -> None:
        pass


class HttpOrigin:
    """A folder behind a plain HTTP server; `timeout` seconds without a byte end an attempt."""

    def __init__(self, base: str, timeout: float = TIMEOUT) -> None:
        self.base, self.timeout = base.rstrip("/"), timeout
        self.name = self.base

    def read(self, file: str, limit: int) -> bytes | None:
        try:
            with self._request(file, 0) as response:
                announced = response.headers.get("Content-Length")
                if announced is not None and announced.isdecimal():
                    _check_limit(int(announced), limit, f"{self.base}/{file}")
                data: bytes = response.read(limit + 1)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return None
            raise _cut(self.name, file, error) from error
        _check_limit(len(data), limit, f"{self.base}/{file}")
        if announced is not None and announced != str(len(data)):
            raise CutError(
                f"{self.base}/{file} ended after {len(data)} of {announced} bytes. Try again."
            )
        return data

    def open(self, file: str, start: int, size: int) -> Stream:
        try:
            response = self._request(file, start)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise _absent(self.name, file) from error
            raise _cut(self.name, file, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _cut(self.name, file, error) from error
        where = f"{self.base}/{file}"
        headers = response.headers
        part = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if response.status == 206 and part:
            begin, total = int(part[1]), int(part[2])
        else:
            begin, length = 0, headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else size  # unannounced: counted later
        if begin not in (0, start) or total != size:
            response.close()
            _check_announced(total, size, where)
            raise TransferError(f"{where}: the server answered from byte {begin}, not {start}.")
        return Stream(begin, self._chunks(response, file))

    def close(self) -> None:
        pass

    def _request(self, file: str, start: int) -> Any:
        headers = {"User-Agent": "dropbydrop", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        request = urllib.request.Request(f"{self.base}/{quote(file)}", headers=headers)
        return urllib.request.urlopen(request, timeout=self.timeout)

    def _chunks(self, response: Any, file: str) -> Iterator[bytes]:
        with response:
            while True:
                try:
                    # read1 hands over what has arrived: a cut connection loses nothing
                    chunk = response.read1(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _cut(self.name, file, error) from error
                if not chunk:
                    return
                yield chunk


class HubOrigin:
    """A repository of the Hugging Face Hub. A file passes through `staging` and leaves it again."""

    def __init__(self, repo: str, staging: Path, revision: str | None = None) -> None:
        self.repo, self.staging, self.revision = repo, staging, revision
        self.name = f"{repo} on the Hub"

    def read(self, file: str, limit: int) -> bytes | None:
        path = self._download(file)
        if path is None:
            return None
        _check_limit(path.stat().st_size, limit, f"{file} of {self.name}")
        data = path.read_bytes()
        path.unlink()
        return data

    def open(self, file: str, start: int, size: int) -> Stream:
        path = self._download(file)
        if path is None:
            raise _absent(self.name, file)
        _check_announced(path.stat().st_size, size, f"{file} of {self.name}")
        return Stream(start, self._consume(path, start))

    def close(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def _consume(self, path: Path, start: int) -> Iterator[bytes]:
        yield from _file_chunks(path, start)
        path.unlink(missing_ok=True)

    def _download(self, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(
                hf_hub_download(self.repo, file, revision=self.revision, local_dir=self.staging)
            )
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):  # that one means: no network
                return None
            raise _cut(self.name, file, error) from error
        except Exception as error:  # its many network errors share no base class
            raise _cut(self.name, file, error) from error


def _file_chunks(path: Path, start: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            yield chunk


def _check_limit(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise TransferError(
            f"{where} has {size:,} bytes; files of this kind have at most {limit:,}. "
            "It is not what it claims to be; nothing was fetched."
        )


def _check_announced(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise TransferError(
            f"{where} has {found:,} bytes, the manifest says {expected:,}: cut off, or of another "
            "checkpoint. Nothing of it was kept; tell whoever serves it."
        )


def _absent(name: str, file: str) -> TransferError:
    return TransferError(
        f"{name} has no {file}. It may hold lower precisions only; ask for fewer bits, or fetch "
        "from where the whole checkpoint is."
    )


def _cut(name: str, file: str, error: BaseException) -> TransferError:
    first = (str(error).strip().splitlines() or [""])[0]
    # a refusal (403, ...) stays one however often it is asked
    refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
    return (TransferError if refused else CutError)(
        f"{file} could not be read from {name} ({type(error).__name__}: {first}). Check address "
        "and network and run the command again; what has arrived is kept."
    )
