"""Where a checkpoint can be fetched from: a folder, a plain HTTP server, a repository of the Hub.

An origin does two things: read a small file whole, and open a large one at an offset. It knows
nothing of hashes; pull.py verifies whatever comes. What an origin does check is the size that
a server announces, because that is the moment at which nothing has been downloaded yet.

HTTP is plain GET with Range (http_client.py), so any static file server will do; one that ignores
Range is read from the beginning again. The Hub goes through huggingface_hub, which knows about
tokens and mirrors and resumes by itself.
"""

from __future__ import annotations

import http.client
import re
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from dropbydrop.system.errors import DropError, first_line
from dropbydrop.system.paths import given

from .http_client import Response, request

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
    """What pull.py needs of a source; `name`/file is what messages call a file."""

    name: str

    def read(self, file: str, limit: int) -> bytes | None:
        """A small file whole, or None if there is none of this name (TransferError)."""

    def open(self, file: str, start: int, size: int) -> Stream:
        """A file of `size` bytes from offset `start` (TransferError)."""


def origin(source: str | Path, staging: Path, revision: str | None = None) -> Origin:
    """The origin that `source` names: http(s) address, local folder, or hub id (owner/name).

    Args:
        staging: a folder that a hub download may create and use; the caller removes it.
        revision: branch, tag or commit of a hub repository.

    Raises:
        TransferError: none of these.
    """
    text = str(source)
    if text.startswith(("http://", "https://")):
        return HttpOrigin(text)
    if given(source).is_dir():
        return FolderOrigin(given(source))
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
        _check_limit(path.stat().st_size, limit, f"{self.name}/{file}")
        return path.read_bytes()

    def open(self, file: str, start: int, size: int) -> Stream:
        path = self.folder / file
        if not path.is_file():
            raise _absent(self.name, file)
        _check_announced(path.stat().st_size, size, f"{self.name}/{file}")
        return Stream(start, _file_chunks(path, start))


def _number(text: str, other: int) -> int:
    """A number in a header; `other` if it is none, or one that no file has."""
    return int(text) if text.isdecimal() and len(text) < 20 else other


class HttpOrigin:
    """A folder behind a plain HTTP server; `timeout` seconds without progress end an attempt."""

    def __init__(self, base: str, timeout: float = TIMEOUT) -> None:
        self.name, self.timeout = base.rstrip("/"), timeout

    def read(self, file: str, limit: int) -> bytes | None:
        response = self._request(file, 0)
        if response is None:
            return None
        where, announced = f"{self.name}/{file}", response.headers.get("Content-Length", "")
        data = bytearray()
        with response:
            _check_limit(_number(announced, 0), limit, where)
            for chunk in self._chunks(response, file):
                data += chunk
                _check_limit(len(data), limit, where)
        if announced and announced != str(len(data)):
            raise CutError(f"{where} ended after {len(data)} of {announced} bytes. Try again.")
        return bytes(data)

    def open(self, file: str, start: int, size: int) -> Stream:
        response = self._request(file, start)
        if response is None:
            raise _absent(self.name, file)
        where, headers = f"{self.name}/{file}", response.headers
        part = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if response.status == 206 and part:
            begin, total = (_number(text, -1) for text in part.groups())
        else:  # unannounced: counted later
            begin, total = 0, _number(headers.get("Content-Length", ""), size)
        if begin not in (0, start) or total != size:
            response.close()
            _check_announced(total, size, where)
            raise TransferError(f"{where}: the server answered from byte {begin}, not {start}.")
        return Stream(begin, self._chunks(response, file))

    def _request(self, file: str, start: int) -> Response | None:
        """The response, or None if there is no such file."""
        headers = {"User-Agent": "dropbydrop", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            return request(f"{self.name}/{quote(file)}", headers, self.timeout)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return None
            raise _cut(self.name, file, error) from error

    def _chunks(self, response: Response, file: str) -> Iterator[bytes]:
        with response:
            try:
                # read1 hands over what has arrived: a cut connection loses nothing
                while chunk := response.read1(CHUNK):
                    yield chunk
            except (OSError, http.client.HTTPException) as error:
                raise _cut(self.name, file, error) from error


class HubOrigin(FolderOrigin):
    """A repository of the Hugging Face Hub. A file passes through `staging` and leaves it again."""

    def __init__(self, repo: str, staging: Path, revision: str | None = None) -> None:
        super().__init__(staging)
        self.repo, self.revision, self.name = repo, revision, f"https://huggingface.co/{repo}"

    def read(self, file: str, limit: int) -> bytes | None:
        self._download(file)
        return super().read(file, limit)

    def open(self, file: str, start: int, size: int) -> Stream:
        self._download(file)
        return Stream(start, self._consume(file, super().open(file, start, size).chunks))

    def _consume(self, file: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from chunks
        (self.folder / file).unlink()

    def _download(self, file: str) -> None:
        """Bring a file into the folder; one that the repository lacks stays absent."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            hf_hub_download(self.repo, file, revision=self.revision, local_dir=self.folder)
        except RemoteEntryNotFoundError:
            pass
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
    # a refusal (403, ...) stays one however often it is asked
    refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
    return (TransferError if refused else CutError)(
        f"{file} could not be read from {name} ({first_line(error)}). Check address "
        "and network and run the command again; what has arrived is kept."
    )
