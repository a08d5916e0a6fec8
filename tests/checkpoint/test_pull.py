"""slice and pull: partial folders, broken transfers, damaged files, servers that lie."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint import origins as origin
from dropbydrop.checkpoint import pull as transfer
from dropbydrop.checkpoint.config import MANIFEST_FILE
from dropbydrop.checkpoint.origins import HttpOrigin, TransferError
from dropbydrop.checkpoint.pull import pull
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.cli import main as cli
from dropbydrop.system.atomic_folder import AtomicFolder
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from file_server import Server, flip
from tiny import COUNTS, VOCAB, write_checkpoint

IDS = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(5))
PLANE = "plane-2.safetensors"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {"README.md": b"# a card\n", "quantize-log.jsonl": b"{}\n"}
    return write_checkpoint(tmp_path_factory.mktemp("transfer") / "out", extra_files=files)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PAUSE", 0.0)
    monkeypatch.setattr(origin, "CHUNK", 1000)


def logits(folder: Path, bits: int) -> torch.Tensor:
    with torch.no_grad():
        return dropbydrop.load(folder, bits=bits)(IDS).logits


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def server(out: Path) -> Iterator[Server]:
    server = Server(out)
    yield server
    for gate in server.gate.values():
        gate.set()
    server.http.shutdown()
    server.http.server_close()


def fetch(server: Server, dest: Path, bits: int | None = None, **settings: Any) -> Any:
    return pull(server.url, dest, bits, progress=False, **{"attempts": 1, **settings})


# ------------------------------------------------------------------------------------ slice


def test_slice_is_a_partial_checkpoint(out: Path, tmp_path: Path) -> None:
    done = slice_checkpoint(out, tmp_path / "two", 2)
    two = done.path
    assert names(out) - names(two) == {"plane-3.safetensors", "plane-4.safetensors"}
    for name in names(two):
        assert (two / name).read_bytes() == (out / name).read_bytes()
    assert Checkpoint.open(two).verify() == []
    assert torch.equal(logits(two, 2), logits(out, 2))
    with pytest.raises(MissingPlaneError, match="plane 3 is needed"):
        dropbydrop.load(two, bits=3)
    assert done.bytes == sum((two / n).stat().st_size for n in names(two) - {"manifest.json"})
    # a slice of a slice, and one that asks for what is not there
    assert names(slice_checkpoint(two, tmp_path / "again", 2).path) == names(two)
    with pytest.raises(MissingPlaneError):
        slice_checkpoint(two, tmp_path / "three", 3)
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        slice_checkpoint(out, tmp_path / "five", 5)
    with pytest.raises(TransferError, match="the same folder"):  # it would lose its planes
        slice_checkpoint(tmp_path / "two/../again", tmp_path / "again", 2, overwrite=True)
    assert names(tmp_path) == {"two", "again"}


def test_a_source_that_is_replaced_while_it_is_sliced(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tensors were copied, and not yet the manifest."""
    source = tmp_path / "source"
    shutil.copytree(out, source)
    copy = AtomicFolder.copy

    def replaced(self: AtomicFolder, name: str, path: Path) -> None:
        copy(self, name, path)
        if name == "plane-2.safetensors":
            other = json.loads((source / MANIFEST_FILE).read_text())
            (source / MANIFEST_FILE).write_text(json.dumps(other, indent=3))

    monkeypatch.setattr(AtomicFolder, "copy", replaced)
    with pytest.raises(FormatError, match="replaced meanwhile"):
        slice_checkpoint(source, tmp_path / "two", 2)
    assert names(tmp_path) == {"source"}


def test_each_level_has_its_planes(tmp_path: Path, code: str) -> None:
    """Slices, and a folder that grows by pulls, hold the planes of their level and no others."""
    out = write_checkpoint(tmp_path / "out", code=code)
    for bits, count in COUNTS[code].items():
        planes = [f"plane-{m}.safetensors" for m in range(1, count + 1)]
        for done in (
            slice_checkpoint(out, tmp_path / f"slice{bits}", bits),
            pull(out, tmp_path / "grown", bits, progress=False),
        ):
            assert done.bits == bits
            assert sorted(name for name in names(done.path) if name.startswith("plane")) == planes
            here = Checkpoint.open(done.path)
            assert here.require(bits) == bits
            assert here.bytes_at(bits) == sum(
                (done.path / name).stat().st_size for name in ("model.safetensors", *planes)
            )
            assert torch.equal(logits(done.path, bits), logits(out, bits))
            if bits < 4:
                with pytest.raises(MissingPlaneError, match=f"plane {count + 1} is needed"):
                    here.require(bits + 1)


def test_slice_never_writes_what_is_damaged(out: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(out, tmp_path / "bad"))
    flip(bad / PLANE)
    with pytest.raises(TransferError, match=r"plane-2.* has SHA-256 .* the manifest says"):
        slice_checkpoint(bad, tmp_path / "two", 2)
    assert names(tmp_path) == {"bad"}
    shutil.copy(out / PLANE, bad)
    (bad / "README.md").write_text("edited after publication")
    assert slice_checkpoint(bad, tmp_path / "two", 2).edited == ["README.md"]
    with pytest.raises(DropError, match="exists; choose another name"):
        slice_checkpoint(out, tmp_path / "two", 2)
    slice_checkpoint(out, tmp_path / "two", 3, overwrite=True)
    assert (tmp_path / "two" / "plane-3.safetensors").is_file()


# ------------------------------------------------------------------------------------- pull


def test_pull_fetches_what_lacks_and_no_more(server: Server, out: Path, tmp_path: Path) -> None:
    done = fetch(server, tmp_path / "copy", 2)
    assert names(done.path) == names(out) - {"plane-3.safetensors", "plane-4.safetensors"}
    assert done.kept == []
    assert torch.equal(logits(done.path, 2), logits(out, 2))
    # what is needed first came first
    tensors = [name for name, _ in server.log if name.endswith(".safetensors")]
    assert tensors == ["model.safetensors", "plane-1.safetensors", PLANE]
    server.log.clear()
    more = fetch(server, tmp_path / "copy", 4)
    assert more.fetched == ["plane-3.safetensors", "plane-4.safetensors"]
    asked = {name for name, _ in server.log}
    assert asked - {"sensitivity.json"} == {"manifest.json", "config.json", *more.fetched}
    assert names(more.path) == names(out)
    assert Checkpoint.open(more.path).verify() == []
    assert torch.equal(logits(more.path, 4), logits(out, 4))
    assert fetch(server, tmp_path / "copy").fetched == []  # all bits: nothing left to do


def test_pull_from_a_folder_and_a_slice(out: Path, tmp_path: Path) -> None:
    two = slice_checkpoint(out, tmp_path / "two", 2).path
    copy = pull(two, tmp_path / "copy", 2, progress=False).path
    assert names(copy) == names(two)
    with pytest.raises(TransferError, match=r"has no plane-3.* ask for fewer bits"):
        pull(two, copy, 3, progress=False)
    assert names(copy) == names(two)
    assert pull(out, copy, progress=False).bits == 4
    assert names(copy) == names(out)
    with pytest.raises(TransferError, match="the same folder"):
        pull(copy, copy, 2, progress=False)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_transfer_goes_on(server: Server, out: Path, tmp_path: Path, ranges: bool) -> None:
    server.cut[PLANE], server.ranges = 3500, ranges
    dest = tmp_path / "copy"
    with pytest.raises(TransferError, match=r"plane-2.* ended after 3,500 of .* go on from there"):
        fetch(server, dest, 2)
    assert (dest / f"{PLANE}.part").read_bytes() == (out / PLANE).read_bytes()[:3500]
    assert not (dest / PLANE).exists()
    assert (dest / "plane-1.safetensors").is_file()
    with pytest.raises(MissingPlaneError):
        dropbydrop.load(dest, bits=2)
    done = fetch(server, dest, 2)
    assert done.fetched == [PLANE]
    assert server.asked(PLANE) == [0, 3500 if ranges else 0]
    assert done.bytes == (out / PLANE).stat().st_size - (3500 if ranges else 0)
    assert torch.equal(logits(dest, 2), logits(out, 2))
    assert not [name for name in names(dest) if name.endswith(".part")]


def test_a_cut_connection_is_tried_again_at_once(server: Server, out: Path, tmp_path: Path) -> None:
    server.cut[PLANE] = 3500
    server.cut["tokenizer.json"] = 10
    done = fetch(server, tmp_path / "copy", 2, attempts=2)
    assert server.asked(PLANE) == [0, 3500]
    assert Checkpoint.open(done.path).verify() == []


def test_a_damaged_plane_is_refused(server: Server, out: Path, tmp_path: Path) -> None:
    dest, good = tmp_path / "copy", (out / PLANE).read_bytes()
    server.body[PLANE] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(TransferError, match=r"plane-2.* has SHA-256 .* It was not kept"):
        fetch(server, dest, 3)
    assert not list(dest.glob("plane-2*"))
    assert (dest / "plane-1.safetensors").is_file()  # finished files stay
    server.body.clear()
    server.log.clear()
    assert fetch(server, dest, 3).fetched == [PLANE, "plane-3.safetensors"]
    assert server.asked("plane-1.safetensors") == []


def test_a_damaged_part_is_fetched_again(server: Server, out: Path, tmp_path: Path) -> None:
    dest = tmp_path / "copy"
    server.cut[PLANE] = 3500
    with pytest.raises(TransferError):
        fetch(server, dest, 2)
    flip(dest / f"{PLANE}.part")
    done = fetch(server, dest, 2)
    assert server.asked(PLANE) == [0, 3500, 0]
    assert done.resumed == 0
    assert Checkpoint.open(dest).verify() == []
    # a finished file that was damaged on disk is noticed and fetched again too
    flip(dest / PLANE)
    assert fetch(server, dest, 2).fetched == [PLANE]
    assert Checkpoint.open(dest).verify() == []


@pytest.mark.parametrize("claim", [1 << 50, 10])
def test_a_server_that_lies_about_sizes(
    server: Server, out: Path, tmp_path: Path, claim: int
) -> None:
    size = (out / PLANE).stat().st_size
    server.claim[PLANE] = claim
    with pytest.raises(TransferError, match=rf"has {claim:,} bytes, the manifest says {size:,}"):
        fetch(server, tmp_path / "copy", 2)
    assert not list((tmp_path / "copy").glob("plane-2*"))


def test_a_body_without_end(server: Server, out: Path, tmp_path: Path) -> None:
    """Nothing announced, more sent than the manifest says: the disk is not filled."""
    server.announce = False
    server.body[PLANE] = (out / PLANE).read_bytes() + b"x" * 100_000
    with pytest.raises(TransferError, match=r"does not end at the [\d,]+ bytes"):
        fetch(server, tmp_path / "copy", 2)
    assert not list((tmp_path / "copy").glob("plane-2*"))
    server.body.clear()
    assert fetch(server, tmp_path / "copy", 2).fetched == [PLANE]


def test_a_card_may_be_edited_and_nothing_else(server: Server, tmp_path: Path) -> None:
    """An edited card is no file of this checkpoint: it is reported, not fetched. One that was
    edited here stays; any other text that differs is fetched again."""
    server.body["README.md"] = b"# edited after publication"
    done = fetch(server, tmp_path / "copy", 2)
    assert done.edited == ["README.md"]
    assert not (done.path / "README.md").exists()
    server.body.clear()
    assert fetch(server, done.path, 2).fetched == ["README.md"]
    for name in ("README.md", "tokenizer.json", "config.json"):
        (done.path / name).write_bytes(b"<html>of a proxy</html>")
    again = fetch(server, done.path, 2)
    assert again.edited == ["README.md"]
    assert sorted(again.fetched) == ["config.json", "tokenizer.json"]
    assert (done.path / "README.md").read_bytes().startswith(b"<html>")
    server.body["tokenizer.json"] = b"<html>of a proxy</html>"
    with pytest.raises(TransferError, match=r"tokenizer.json from .* has SHA-256 .* not kept"):
        fetch(server, tmp_path / "other", 2)
    assert not (tmp_path / "other" / "tokenizer.json").exists()
    server.body.clear()
    assert fetch(server, tmp_path / "other", 2).edited == []


def hostile_manifest(out: Path, **changes: Any) -> bytes:
    manifest = json.loads((out / "manifest.json").read_bytes())
    return json.dumps({**manifest, **changes}).encode()


def test_hostile_manifests(server: Server, out: Path, tmp_path: Path) -> None:
    dest = tmp_path / "copy"
    files = json.loads((out / "manifest.json").read_bytes())["files"]
    outside = {**files, "../outside": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    for body, message in [
        (hostile_manifest(out, files=outside), "only plain file names"),
        (hostile_manifest(out, files={**files, "model.py": files["README.md"]}), "lists model.py"),
        (hostile_manifest(out, files={**files, "w.bin": files["README.md"]}), "neither code nor"),
        (hostile_manifest(out, files={**files, "x.part": files["README.md"]}), "lists x.part"),
        (hostile_manifest(out, format_version=2), "format_version 2"),
        (b"<html>not here</html>", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b" " * (17 << 20), "at most 16,777,216"),
    ]:
        server.body["manifest.json"] = body
        with pytest.raises(DropError, match=message):
            fetch(server, dest, 2)
    huge = {**files, PLANE: {"size": 1 << 60, "sha256": files[PLANE]["sha256"]}}
    server.body["manifest.json"] = hostile_manifest(out, files=huge)
    with pytest.raises(TransferError, match="GB free"):
        fetch(server, tmp_path / "huge", 2)
    assert not dest.exists()
    assert not (tmp_path / "outside").exists()


def test_wrong_places(server: Server, out: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    before = {path: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(FormatError, match="holds another checkpoint"):
        fetch(server, other, 2)
    assert {path: path.read_bytes() for path in other.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(TransferError, match="is no dropbydrop checkpoint"):
        fetch(server, tmp_path / "mine", 2)
    with pytest.raises(TransferError, match="create it first"):
        fetch(server, tmp_path / "a" / "b", 2)
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        fetch(server, tmp_path / "new", 1)
    server.folder = tmp_path
    with pytest.raises(FormatError, match=r"has no manifest.json"):
        fetch(server, tmp_path / "new", 2)
    with pytest.raises(TransferError, match="no folder, no http"):
        pull("file:///etc/passwd", tmp_path / "new")
    with pytest.raises(TransferError, match="Check address"):
        pull("http://127.0.0.1:9", tmp_path / "new", progress=False)
    assert names(tmp_path) == {"other", "mine"}
    assert names(tmp_path / "mine") == {"file"}


def test_one_pull_at_a_time(server: Server, tmp_path: Path) -> None:
    dest = tmp_path / "copy"
    server.gate[PLANE] = threading.Event()
    first = threading.Thread(target=fetch, args=(server, dest, 2))
    first.start()
    while not (dest / f"{PLANE}.part").exists():
        pass
    assert transfer.is_pulling(dest)
    with pytest.raises(TransferError, match="another pull"):
        fetch(server, dest, 2)
    server.gate[PLANE].set()
    first.join()
    assert not transfer.is_pulling(dest)
    assert Checkpoint.open(dest).require(2) == 2


def test_a_silent_server_times_out(server: Server, tmp_path: Path) -> None:
    server.gate[PLANE] = threading.Event()
    quiet = HttpOrigin(server.url, timeout=0.3)
    with pytest.raises(TransferError, match=r"could not be read .*(timed out|less than 1024)"):
        pull(server.url, tmp_path / "copy", 2, progress=False, attempts=1, from_origin=quiet)
    assert (tmp_path / "copy" / f"{PLANE}.part").stat().st_size > 0


def test_pull_from_the_hub(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of huggingface_hub, with a download that copies from a folder."""
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    calls = []

    def download(repo: str, name: str, *, revision: str | None, local_dir: Path) -> str:
        calls.append((repo, name, revision))
        if not (out / name).is_file():
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        local_dir.mkdir(parents=True, exist_ok=True)
        return shutil.copy(out / name, local_dir)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    done = pull("owner/model", tmp_path / "copy", 2, revision="v1", progress=False)
    assert names(done.path) == names(out) - {"plane-3.safetensors", "plane-4.safetensors"}
    assert calls[0] == ("owner/model", "manifest.json", "v1")
    assert ("owner/model", "plane-3.safetensors", "v1") not in calls


def test_commands(
    server: Server, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: object) -> tuple[int, str, str]:
        old, sys.argv = sys.argv, ["dropbydrop", *map(str, argv)]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = old
        return code, *capsys.readouterr()

    code, stdout, _ = run("slice", out, tmp_path / "two", "--bits", 2, "--json")
    assert code == 0
    assert json.loads(stdout.splitlines()[-1])["bits"] == 2
    code, stdout, _ = run("pull", server.url, tmp_path / "copy", "--bits", 3, "--json")
    assert code == 0
    assert "plane-3.safetensors" in json.loads(stdout.splitlines()[-1])["fetched"]
    code, _, stderr = run("pull", server.url, tmp_path / "copy", "--bits", 9)
    assert code == 2
    assert "precision 9 is not a level" in stderr
