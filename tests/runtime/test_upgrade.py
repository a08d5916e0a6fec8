"""Planes that stream in behind a model that already answers."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dropbydrop
from dropbydrop.checkpoint import origins as origin
from dropbydrop.checkpoint.pull import pull
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.runtime import plane_store as store
from dropbydrop.runtime.views import store_of
from dropbydrop.system.errors import DropError, FormatError, MissingPlaneError, PrecisionError
from file_server import Server, flip
from tiny import COUNTS, VOCAB, write_checkpoint

IDS = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(5))
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
WAIT = 20.0


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("upgrade") / "out", code=code)


@pytest.fixture(scope="module")
def whole(out: Path) -> dict[int, torch.Tensor]:
    """Logits of every level of a model loaded the ordinary way."""
    model = dropbydrop.load(out)
    return {bits: logits(dropbydrop.view(model, bits)) for bits in (2, 3, 4)}


@pytest.fixture(scope="module")
def last(code: str) -> dict[int, str]:
    """The last plane file of every level."""
    return {bits: f"plane-{count}.safetensors" for bits, count in COUNTS[code].items()}


@pytest.fixture
def server(out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(origin, "CHUNK", 1000)
    server = Server(out)
    yield server
    for gate in server.gate.values():
        gate.set()
    server.http.shutdown()
    server.http.server_close()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def codes_in_memory(model: Any) -> int:
    return sum(p.data.numel() for p in store_of(model)._planes.values())


def test_upgrade_from_a_whole_folder(out: Path, whole: dict[int, torch.Tensor]) -> None:
    model = dropbydrop.load(out, bits=2, upgrade=True)
    assert dropbydrop.precision(model) == 2
    handle = dropbydrop.upgrade(model)
    assert handle.wait(4, WAIT)
    assert handle.level == 4
    for bits in (2, 3, 4):
        assert torch.equal(logits(dropbydrop.view(model, bits)), whole[bits])
    assert torch.equal(logits(model), whole[2])  # the model itself stays what it was
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        handle.wait(5)


def test_a_slow_server(
    server: Server, tmp_path: Path, whole: dict[int, torch.Tensor], last: dict[int, str]
) -> None:
    """Answer at 2 bits, then 3, then 4, while one pull brings the planes; never stop answering."""
    dest = tmp_path / "copy"
    for name in last.values():
        server.gate[name] = threading.Event()
    fetching = threading.Thread(
        target=lambda: pull(server.url, dest, 4, progress=False, attempts=1)
    )
    fetching.start()
    while not (dest / f"{last[2]}.part").exists():
        time.sleep(0.001)
    loaded: list[Any] = []
    loading = threading.Thread(
        target=lambda: loaded.append(dropbydrop.load(dest, bits=2, upgrade=True))
    )
    loading.start()
    loading.join(0.3)
    assert not loaded  # half of a plane is no plane
    server.gate[last[2]].set()
    loading.join(WAIT)
    model = loaded[0]
    handle = dropbydrop.upgrade(model)
    assert torch.equal(logits(model), whole[2])
    assert not handle.wait(3, 0.2)
    assert (handle.level, handle.done) == (2, False)
    with pytest.raises(MissingPlaneError):
        dropbydrop.view(model, 3)
    plane = codes_in_memory(model) // 2
    alone = model.generate(IDS, **SETTINGS)
    answers: list[torch.Tensor] = []
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            answers.append(model.generate(IDS, **SETTINGS))

    running = threading.Thread(target=answer)
    running.start()
    server.gate[last[3]].set()
    assert handle.wait(3, WAIT)
    assert torch.equal(logits(dropbydrop.view(model, 3)), whole[3])
    assert codes_in_memory(model) == 3 * plane
    assert not handle.wait(4, 0.2)
    server.gate[last[4]].set()
    assert handle.wait(4, WAIT)
    view = dropbydrop.view(model, 4)
    stop.set()
    running.join()
    fetching.join()
    assert answers
    assert all(torch.equal(text, alone) for text in answers)
    assert torch.equal(logits(view), whole[4])
    assert codes_in_memory(model) == 4 * plane  # by the new planes only
    old = store_of(model).plane("model.layers.0.mlp.up_proj", 1).data
    assert view.model.layers[0].mlp.up_proj.codes[1].data_ptr() == old.data_ptr()


def test_a_pull_that_breaks_off(
    server: Server, tmp_path: Path, whole: dict[int, torch.Tensor], last: dict[int, str]
) -> None:
    dest, failures = tmp_path / "copy", []
    server.cut[last[4]] = 3500
    server.gate[last[4]] = threading.Event()

    def fetch() -> None:
        try:
            pull(server.url, dest, 4, progress=False, attempts=1)
        except DropError as error:
            failures.append(error)

    fetching = threading.Thread(target=fetch)
    fetching.start()
    while not (dest / f"{last[4]}.part").exists():
        time.sleep(0.001)
    model = dropbydrop.load(dest, bits=2, upgrade=True)
    handle = dropbydrop.upgrade(model)
    assert handle.wait(3, WAIT)
    server.gate[last[4]].set()
    fetching.join()
    assert len(failures) == 1
    with pytest.raises(MissingPlaneError, match=f"{last[4]} is missing"):
        handle.wait(4, WAIT)
    assert handle.done
    assert torch.equal(logits(dropbydrop.view(model, 3)), whole[3])
    # the transfer is resumed, and so is the upgrade, under the same model
    server.gate.clear()
    pull(server.url, dest, 4, progress=False)
    again = dropbydrop.upgrade(model)
    assert again is not handle
    assert again.wait(4, WAIT)
    assert torch.equal(logits(dropbydrop.view(model, 4)), whole[4])


def test_a_damaged_plane_does_not_get_in(
    out: Path, tmp_path: Path, code: str, last: dict[int, str]
) -> None:
    dest = Path(shutil.copytree(out, tmp_path / "copy"))
    with open(dest / last[3], "ab") as file:
        file.write(b"more")
    model = dropbydrop.load(dest, bits=2, upgrade=True)
    handle = dropbydrop.upgrade(model)
    with pytest.raises(FormatError, match=rf"{last[3]} has .* bytes, the manifest says"):
        handle.wait(3, WAIT)
    assert store_of(model).loaded == COUNTS[code][2]
    with pytest.raises(MissingPlaneError):
        dropbydrop.view(model, 3)
    logits(model)


def test_a_flipped_bit_on_the_way_never_becomes_a_plane(
    server: Server, out: Path, tmp_path: Path, last: dict[int, str]
) -> None:
    damaged = Path(shutil.copytree(out, tmp_path / "damaged"))
    flip(damaged / last[3])
    server.folder = damaged
    dest = tmp_path / "copy"
    with pytest.raises(DropError, match=rf"{last[3]} .*has SHA-256"):
        pull(server.url, dest, 4, progress=False, attempts=1)
    model = dropbydrop.load(dest, bits=2, upgrade=True)
    with pytest.raises(MissingPlaneError, match=f"{last[3]} is missing"):
        dropbydrop.upgrade(model).wait(3, WAIT)


def test_nothing_more_to_come(out: Path, tmp_path: Path, last: dict[int, str]) -> None:
    two = slice_checkpoint(out, tmp_path / "two", 2).path
    model = dropbydrop.load(two, bits=2, upgrade=True)
    with pytest.raises(MissingPlaneError):
        dropbydrop.upgrade(model).wait(3, WAIT)
    with pytest.raises(MissingPlaneError, match=f"{last[3]} is missing"):
        dropbydrop.load(two, bits=3, upgrade=True)
    with pytest.raises(PrecisionError, match="begins at a level"):
        dropbydrop.load(out, avg_bits=2.5, upgrade=True)


def test_an_upgrade_can_be_stopped(out: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go = threading.Event(), threading.Event()
    read = store.PlaneStore._read_plane

    def slow(self: Any, *args: Any) -> Any:
        reading.set()
        go.wait(WAIT)
        return read(self, *args)

    monkeypatch.setattr(store.PlaneStore, "_read_plane", slow)
    model = dropbydrop.load(out, bits=2, upgrade=True)
    handle = dropbydrop.upgrade(model)
    assert reading.wait(WAIT)
    logits(model)  # a plane that is being read holds nobody up
    stopping = threading.Thread(target=handle.stop)
    stopping.start()
    while not handle._stop.is_set():
        time.sleep(0.001)
    go.set()
    stopping.join()
    with pytest.raises(DropError, match="stopped at 2 bits"):
        handle.wait(3)
    assert store_of(model).loaded == COUNTS[code][2]
    monkeypatch.undo()
    assert dropbydrop.upgrade(model).wait(4, WAIT)
