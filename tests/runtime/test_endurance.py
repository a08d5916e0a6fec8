"""Nothing grows: many generations and views of one model, and a process that forks after loading.

`benchmarks/endurance.py` runs the same functions with 10,000 generations and 1,000 views.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

import dropbydrop
from endurance import generations, views
from tiny import VOCAB, write_checkpoint

IDS = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, code: str) -> Any:
    out = write_checkpoint(tmp_path_factory.mktemp("endurance") / "out", code=code)
    return dropbydrop.load(out, bits=4)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_generations_and_views_leave_nothing(model: Any) -> None:
    for work, count in ((generations, 40), (views, 40)):
        work(model, 10)  # caches fill
        grown = work(model, count)
        assert grown.objects == 0, work.__name__
        assert grown.mib < 8, work.__name__


def test_a_process_that_forks_after_loading(model: Any) -> None:
    """The child has the model: products of ours have threads of the child's own. torch's have not:
    on GNU OpenMP any child must set one thread before it computes (as workers of a DataLoader do).
    """
    expected = logits(model)
    linear, x = model.model.layers[0].mlp.down_proj, torch.ones(1, 96)
    product = linear(x).tolist()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        same = linear(x).tolist() == product
        torch.set_num_threads(1)
        theirs.send((same, torch.equal(logits(model), expected)))

    process = context.Process(target=child)
    process.start()
    arrived = ours.poll(60)
    process.kill()
    process.join()
    assert arrived, "the child hangs"
    assert ours.recv() == (True, True)
    assert torch.equal(logits(model), expected)
