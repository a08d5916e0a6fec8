"""Sensitivities as they are measured: against a naive computation, and against measured KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dropbydrop
from dropbydrop.evaluation.perplexity import evaluate
from dropbydrop.evaluation.sensitivity_probe import measure, self_windows
from dropbydrop.planning.sensitivity import Sensitivity
from dropbydrop.runtime.modules import NestedLinear
from dropbydrop.runtime.views import store_of
from dropbydrop.system.errors import DropError, PrecisionError
from tiny import VOCAB, decoded_reference, tiny_llama, write_checkpoint

IDS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("probe") / "out", code=code)


@pytest.fixture(scope="module")
def model(out: Path) -> Any:
    return dropbydrop.load(out)


@pytest.fixture(scope="module")
def known(model: Any) -> Sensitivity:
    return measure(model, IDS, progress=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def linears(model: Any) -> list[NestedLinear]:
    return [m for m in model.modules() if isinstance(m, NestedLinear)]


def naive_forms(model: Any, ids: torch.Tensor) -> dict[str, dict[int, float]]:
    """1/2 mean_t (g_t . dW x_t)^2 by autograd on dense weights, labels drawn in the same order."""
    store = store_of(model)
    plain = decoded_reference(tiny_llama(), model)
    dense = {
        p: {m.name: m.dense_weight() for m in linears(dropbydrop.view(model, p))} for p in (2, 3, 4)
    }
    generator = torch.Generator().manual_seed(0)
    result: dict[str, dict[int, float]] = {
        input_group.name: {2: 0.0, 3: 0.0}
        for input_group in store.checkpoint.quantization.input_groups
    }
    for window in ids:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        hooks = [_watch(plain.get_submodule(name), name, seen) for name in dense[2]]
        log_p = torch.log_softmax(plain(window[None]).logits[0], -1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, labels).sum().backward()
        for input_group in store.checkpoint.quantization.input_groups:
            for p in (2, 3):
                inner = torch.zeros(ids.shape[1])
                for m in input_group.modules:
                    x, y = seen[m]
                    assert y.grad is not None
                    inner += (y.grad[0] * (x[0] @ (dense[p][m] - dense[4][m]).T)).sum(-1).detach()
                result[input_group.name][p] += 0.5 * float(inner.square().sum()) / ids.numel()
        for hook in hooks:
            hook.remove()
    return result


def _watch(module: Any, name: str, seen: dict[str, Any]) -> Any:
    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen[name] = (args[0], output)

    return module.register_forward_hook(hook)


def test_losses_against_a_naive_computation(model: Any, known: Sensitivity) -> None:
    before = logits(model)
    naive = naive_forms(model, IDS)
    full = dropbydrop.view(model, 4)
    figures = evaluate(
        {str(p): dropbydrop.view(model, p) for p in (2, 3)}, full, IDS, progress=False
    )["bits"]
    for p in (2, 3):
        assert known.kl[p] == pytest.approx(figures[str(p)]["kl"], rel=1e-4)
        total = sum(row[p] for row in naive.values())
        for name, row in naive.items():
            expected = row[p] / total * known.kl[p]
            assert known.losses[name][p] == pytest.approx(expected, rel=2e-3), (name, p)
    assert all(row[4] == 0 for row in known.losses.values())
    assert torch.equal(logits(model), before)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_form_predicts_small_divergences(tmp_path: Path) -> None:
    """Uncalibrated, on planes that shrink fast, form and measured KL agree within sampling."""
    out = write_checkpoint(tmp_path / "out", levels=(1, 2), sizes=(1, 0.01))
    model = dropbydrop.load(out)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (24, 24), generator=generator)
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        from dropbydrop.evaluation import sensitivity_probe

        def keep_kl(*args: Any, **kwargs: Any) -> Any:
            seen.update(evaluate(*args, **kwargs)["bits"]["1"])
            return {"bits": {"1": {"kl": 0.0}}}  # 0: the form is left as it is

        patch.setattr(sensitivity_probe, "evaluate", keep_kl)
        found = measure(model, ids, progress=False)
    form = sum(row[1] for row in found.losses.values())
    assert seen["kl"] < 0.05
    assert 0.5 < form / seen["kl"] < 2.0


def test_families_that_add_to_products_in_place(
    model: Any, known: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Falcon does: `mlp_output += attention_output`."""
    mlp = type(model.model.layers[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: plain(self, x).add_(0))
    assert measure(model, IDS, progress=False).losses == known.losses


def test_measuring_needs_the_full_model(out: Path) -> None:
    with pytest.raises(PrecisionError, match="load it at 4 bits, not 2"):
        measure(dropbydrop.load(out, 2), IDS)
    with pytest.raises(DropError, match="1 or more windows"):
        measure(dropbydrop.load(out), IDS[0])


def test_own_windows(model: Any) -> None:
    ids = self_windows(model, 2, 12, seed=3)
    assert ids.shape == (2, 12)
    assert torch.equal(ids, self_windows(model, 2, 12, seed=3))
    assert not torch.equal(ids[0], ids[1])
