"""pull, for both kinds of planes, from hostile servers, into folders that point elsewhere."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dropbydrop.checkpoint import Checkpoint, http_client
from dropbydrop.checkpoint import pull as transfer
from dropbydrop.checkpoint.origins import HttpOrigin, TransferError
from dropbydrop.checkpoint.pull import pull
from dropbydrop.system import atomic_folder
from dropbydrop.system.errors import DropError
from file_server import Server, flip
from tiny import CODES, write_checkpoint

PATIENCE = 0.4  # seconds
Script = Callable[[socket.socket], object]


@pytest.fixture(scope="module", params=CODES)
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hostile") / "out"
    return write_checkpoint(place, code=request.param, extra_files={"README.md": b"# a card"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PAUSE", 0.0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def raw() -> Iterator[Callable[[Script], str]]:
    """serve(script) -> address of a server that answers every connection with `script`."""
    listeners = []

    def serve(script: Script) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.recv(65536)
                script(connection)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in listeners:
        listener.close()


def endless(*parts: bytes) -> Script:
    """Send the first part, and then the last one again and again, slowly."""

    def script(connection: socket.socket) -> None:
        connection.sendall(parts[0])
        while True:
            connection.sendall(parts[-1])
            time.sleep(0.02)

    return script


@pytest.mark.parametrize(
    "script",
    [
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
        endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
        endless(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        endless(b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", b"x" * 9),
    ],
    ids=["body", "chunk", "continue", "header", "redirect"],
)
def test_a_server_that_never_ends_is_left(
    raw: Callable[[Script], str], tmp_path: Path, script: Script
) -> None:
    url, started = raw(script), time.monotonic()
    slow = HttpOrigin(url, timeout=PATIENCE)
    with pytest.raises(TransferError, match="could not be read from"):
        pull(url, tmp_path / "copy", progress=False, attempts=1, from_origin=slow)
    assert time.monotonic() - started < 20 * PATIENCE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["ftp://127.0.0.1:9/x", "file:///etc/passwd", "data:,x"])
def test_redirects_stay_within_http(raw: Callable[[Script], str], tmp_path: Path, to: str) -> None:
    url = raw(lambda c: c.sendall(f"HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n".encode()))
    with pytest.raises(TransferError, match=r"a redirect to .*which is not followed"):
        pull(url, tmp_path / "copy", progress=False)
    assert list(tmp_path.iterdir()) == []


NO_ADDRESSES = ["http://[::1/x", "http://a..b/x", f"http://{'a' * 70}.invalid/", "http://%zz%ff/x",
                "http://127.0.0.1:99999999/x", "http://[abc]/", "http://\ud800/"]  # fmt: skip


@pytest.mark.parametrize("to", NO_ADDRESSES)
def test_what_is_no_address_is_told(raw: Callable[[Script], str], tmp_path: Path, to: str) -> None:
    """Given, or redirected to."""
    with pytest.raises(DropError):
        pull(to, tmp_path / "copy", progress=False, attempts=1)
    found = f"HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n".encode("utf-8", "replace")
    url = raw(lambda c: c.sendall(found))
    with pytest.raises(TransferError, match="could not be read from"):
        pull(url, tmp_path / "copy", progress=False, attempts=1)
    assert list(tmp_path.iterdir()) == []


def test_addresses_with_other_letters_than_those_of_ascii(
    raw: Callable[[Script], str], tmp_path: Path
) -> None:
    """Given, or redirected to: headers are bytes, which browsers pass on as they are."""
    server = Server(tmp_path)
    server.body["caf%C3%A9%20au%20lait"] = b"{}"  # as it is asked for
    url = server.url + "café au lait"
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + url.encode() + b"\r\nContent-Length: 0\r\n\r\n"
    for asked in (url, raw(lambda c: c.sendall(moved))):
        with http_client.request(asked, {}, 5.0) as response:
            assert response.read1(9) == b"{}"
    server.http.shutdown()
    server.http.server_close()


def test_a_redirect_within_http_is_followed(
    raw: Callable[[Script], str], out: Path, tmp_path: Path
) -> None:
    server = Server(out)

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: " + server.url.encode())
        connection.sendall(b"manifest.json\r\nContent-Length: 0\r\n\r\n")

    with http_client.request(raw(script) + "/manifest.json", {}, 5.0) as response:
        assert response.read1(1 << 20) == (out / "manifest.json").read_bytes()
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize("name", ["Content-Length", "Content-Range"])
def test_numbers_that_no_file_has(raw: Callable[[Script], str], name: str) -> None:
    """Python reads no integer of 5,000 digits, which a server can send."""
    digits = "9" * 5000
    value = digits if name == "Content-Length" else f"bytes {digits}-9/{digits}"
    status = "200 OK" if name == "Content-Length" else "206 Partial Content"

    def script(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 {status}\r\n{name}: {value}\r\n\r\nabc".encode())

    origin = HttpOrigin(raw(script))
    with suppress(TransferError):
        origin.read("config.json", 100)
    with suppress(TransferError):
        origin.open("plane-1.safetensors", 7, 100)


def test_symbolic_links_in_the_destination_are_refused(out: Path, tmp_path: Path) -> None:
    """Nothing is written through them, whichever file they stand for."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("config.json", "plane-1.safetensors.part", transfer.STAGING):
        copy = tmp_path / "copy"
        copy.mkdir()
        (copy / name).symlink_to(precious)
        with pytest.raises(TransferError, match=f"holds a symbolic link, {name}"):
            pull(out, copy, progress=False)
        shutil.rmtree(copy)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(TransferError, match="link is a symbolic link"):
        pull(out, tmp_path / "link", progress=False)
    assert precious.read_text() == "mine"


def test_what_a_killed_pull_leaves_does_not_stop_the_next(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / transfer.STAGING).mkdir(parents=True)
    (copy / ".manifest.json.partial-0123").write_bytes(b"{")
    assert files(pull(out, copy, progress=False).path) == files(out)


def test_a_failure_before_the_manifest_leaves_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError(5)))
        with pytest.raises(DropError, match="cannot be read or written"):
            pull(out, tmp_path / "copy", progress=False)
    assert list(tmp_path.iterdir()) == []
    assert files(pull(out, tmp_path / "copy", progress=False).path) == files(out)


def test_every_file_and_its_name_are_synced(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each rename the folder is synced, and before it the file: a power cut loses neither."""
    events: list[tuple[str, int]] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        real_sync(descriptor)

    def replace(a: Path, b: Path) -> None:
        events.append(("rename", os.stat(a).st_ino))
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    copy = pull(out, tmp_path / "copy", progress=False).path
    folder = copy.stat().st_ino
    renames = [(i, inode) for i, (what, inode) in enumerate(events) if what == "rename"]
    assert len(renames) == len(files(out))
    for i, inode in renames:
        assert ("sync", inode) in events[:i]
        assert events[i + 1] == ("sync", folder)


def test_a_damaged_or_cut_plane_is_never_kept(out: Path, tmp_path: Path) -> None:
    server = Server(out)
    for plane in sorted(out.glob("plane-*")):
        good = plane.read_bytes()
        server.body[plane.name] = good[:-1] + bytes([good[-1] ^ 1])
        with pytest.raises(TransferError, match="It was not kept"):
            pull(server.url, tmp_path / "copy", progress=False, attempts=1)
        server.body.clear()
        server.cut[plane.name] = len(good) // 2
        with pytest.raises(TransferError, match="go on from there"):
            pull(server.url, tmp_path / "copy", progress=False, attempts=1)
        assert not (tmp_path / "copy" / plane.name).exists()
    assert files(pull(server.url, tmp_path / "copy", progress=False).path) == files(out)
    flip(tmp_path / "copy" / plane.name)
    assert pull(server.url, tmp_path / "copy", progress=False).fetched == [plane.name]
    assert Checkpoint.open(tmp_path / "copy").verify() == []
    server.http.shutdown()
    server.http.server_close()
