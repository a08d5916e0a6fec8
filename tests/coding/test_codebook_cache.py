"""Universal sets that do not ship: trained once a machine, and never mistaken for another."""

import pytest
import torch

from dropbydrop.coding import codebooks
from dropbydrop.coding.codebooks import default_lambdas, train, universal_set
from dropbydrop.quantization.pipeline import quantize
from tiny import save_tiny

QUICK = {"samples": 1024, "rounds": 1, "beam": 1, "seed": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's, little effort, and nothing remembered in the process."""
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(codebooks, "TRAINING", QUICK)
    universal_set.cache_clear()
    yield tmp_path / "cache" / "universal"
    universal_set.cache_clear()


def count_training(monkeypatch):
    """The levels that are trained from now on."""
    trained = []

    def counted(levels, lambdas, **effort):
        trained.append(tuple(levels))
        return train(levels, lambdas, **effort)

    monkeypatch.setattr(codebooks, "train", counted)
    return trained


def test_a_set_is_trained_once(cache, monkeypatch):
    trained = count_training(monkeypatch)
    first = universal_set((2, 4)).stacked
    universal_set.cache_clear()  # as in another process
    assert torch.equal(universal_set((2, 4)).stacked, first)
    assert trained == [(2, 4)]
    assert torch.equal(first, train((2, 4), default_lambdas((2, 4)), **QUICK))
    assert [path.name[:4] for path in cache.iterdir()] == ["2-4-"]  # and nothing half written


def test_the_key_is_all_that_a_set_depends_on(cache, monkeypatch):
    trained = count_training(monkeypatch)
    usual = tuple(default_lambdas((1, 2)))
    asked = ((1, 2),), ((1, 2), (1.0, 1.0)), ((2, 4),)
    sets = [universal_set(*which).stacked for which in asked]
    monkeypatch.setattr(codebooks, "TRAINING", {**QUICK, "samples": 2048})
    universal_set.cache_clear()
    sets.append(universal_set((1, 2)).stacked)
    monkeypatch.setattr(codebooks, "code_digest", lambda *rooms: "other sources")
    universal_set.cache_clear()
    sets.append(universal_set((1, 2)).stacked)
    assert trained == [(1, 2), (1, 2), (2, 4), (1, 2), (1, 2)]
    assert not torch.equal(sets[0], sets[1])
    universal_set.cache_clear()
    assert torch.equal(universal_set((1, 2), usual).stacked, sets[4])  # default weights by value
    assert len(trained) == len(list(cache.iterdir())) == 5


def test_damaged_and_unwritable_caches_cost_time_only(cache, monkeypatch, tmp_path):
    trained = count_training(monkeypatch)
    first = universal_set((1,)).stacked
    (path,) = cache.iterdir()
    path.write_bytes(b"damaged")
    universal_set.cache_clear()
    assert torch.equal(universal_set((1,)).stacked, first)
    universal_set.cache_clear()
    assert torch.equal(universal_set((1,)).stacked, first)
    assert len(trained) == 2
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "file"))
    universal_set.cache_clear()
    assert torch.equal(universal_set((1,)).stacked, first)
    assert len(trained) == 3


def test_shipped_sets_are_not_kept_twice(cache, monkeypatch):
    trained = count_training(monkeypatch)
    universal_set((2, 3, 4))
    assert not trained
    assert not cache.exists()


def test_quantize_trains_once_a_machine(cache, monkeypatch, tmp_path, capsys):
    """`quantize --bits 2,4` twice, as two commands: one training, shown once, the same bytes."""
    trained = count_training(monkeypatch)
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text("the sea and the old mill by the river " * 60)
    planes, shown = [], []
    for name in ("one", "two"):
        universal_set.cache_clear()
        out = quantize(
            tmp_path / "model", tmp_path / name, (2, 4), calibration=tmp_path / "text.txt",
            preset="fast", windows=2, seq_len=16,
        ).out  # fmt: skip
        planes.append([path.read_bytes() for path in sorted(out.glob("plane-*.safetensors"))])
        shown.append("training codebooks" in capsys.readouterr().err)
    assert trained == [(2, 4)]
    assert shown == [True, False]
    assert planes[0] == planes[1]
    assert len(planes[0]) == 4
