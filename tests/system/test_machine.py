"""Where caches lie, what memory is reported, and what is asked of the accelerator."""

from pathlib import Path

import torch

from dropbydrop.system import accelerator
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.memory import device_peak, peak_memory


def test_the_cache_is_where_it_is_asked_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("DROPBYDROP_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("DROPBYDROP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "dropbydrop"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "dropbydrop"


def test_the_peak_grows_with_what_is_held():
    before = peak_memory()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory() >= before
    assert peak_memory() > held.numel()
    assert device_peak(torch.device("cpu")) == 0


def test_triton_is_interpreted_only_on_request(monkeypatch):
    accelerator.triton_interpreted.cache_clear()
    try:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert not accelerator.triton_interpreted()
        accelerator.triton_interpreted.cache_clear()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(accelerator, "find_spec", lambda name: None)
        assert not accelerator.triton_interpreted(), "without Triton there is nothing to interpret"
    finally:
        accelerator.triton_interpreted.cache_clear()
