"""Whole models on a GPU: quantized there, and loaded there next to the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.coding.encoder import Effort
from dropbydrop.data.calibration import Calibration
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization.pipeline import quantize
from tiny import VOCAB, save_tiny

DEVICE = "cuda"
FAMILIES = ["llama", "gemma3", "qwen3-moe", "gpt-oss", "nemotron-h"]
IDS = torch.randint(5, VOCAB, (1, 40), generator=torch.Generator().manual_seed(3))


def logits(model: Any, n: int, device: str) -> Tensor:
    with torch.no_grad():
        return model(IDS[:, :n].to(device)).logits.float().cpu()


def same(found: Tensor, expected: Tensor, share: float) -> bool:
    return bool((found - expected).norm() <= share * expected.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "gradients"])
def test_a_model_made_on_the_device(
    tmp_path: Path, family: str, code: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows are decoded exactly; few go through kernels that round their inputs, those of byte
    planes to 8 bits, which adds up in so narrow a model. `guided` also weights tokens by gradients
    and has embedding and head in planes."""
    effort = Effort(2, 1, 0, guided=guided)
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, effort))
    windows = Calibration(torch.randint(3, 300, (3, 32)), {})
    made = quantize(
        save_tiny(tmp_path / "source", family),
        tmp_path / "out",
        calibration=windows,
        code=code,
        device=DEVICE,
        head_bits=5 if guided else 8,
        progress=False,
    )
    assert Checkpoint.open(made.out).verify() == []
    whole = dropbydrop.load(made.out, device=DEVICE)
    for bits in (4, 2):
        here = dropbydrop.load(made.out, bits=bits)
        there = dropbydrop.view(whole, bits)
        for n, share in ((40, 1e-3), (3, 0.15 if code == "bytes" else 1e-2)):
            assert same(logits(there, n, DEVICE), logits(here, n, "cpu"), share), (bits, n)
    tokens = whole.generate(IDS[:, :9].to(DEVICE), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_levels_of_experts_on_the_device(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan with a level for each expert: planes that some lack come to the device in pieces."""
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    windows = Calibration(torch.randint(3, 300, (3, 32)), {})
    source = save_tiny(tmp_path / "source", "qwen3-moe")
    made = quantize(source, tmp_path / "out", calibration=windows, code=code, progress=False)
    here = dropbydrop.load(made.out, avg_bits=2.6)
    plan = dropbydrop.plan_of(here)
    assert any(not isinstance(level, int) for level in plan.levels.values())
    there = dropbydrop.load(made.out, plan=plan, device=DEVICE)
    assert dropbydrop.plan_of(there) == plan
    for n, share in ((40, 1e-3), (3, 0.15 if code == "bytes" else 1e-2)):
        assert same(logits(there, n, DEVICE), logits(here, n, "cpu"), share), n
