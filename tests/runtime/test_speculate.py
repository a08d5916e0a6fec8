"""Self-speculative decoding: the same tokens, the same distribution, honest measurements."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dropbydrop
from dropbydrop.cli import main as cli
from dropbydrop.planning.plan import Plan
from dropbydrop.runtime import speculate
from dropbydrop.runtime.speculate import (
    MAX_DRAFT,
    PLAIN,
    PROBES,
    Costs,
    Round,
    SpeculationReport,
    Speculator,
    Speedometer,
)
from dropbydrop.runtime.views import store_of
from dropbydrop.system.errors import DropError, PrecisionError
from tiny import CODES, VOCAB, tiny_llama, write_checkpoint

PROMPTS = torch.randint(3, VOCAB, (4, 1, 7), generator=torch.Generator().manual_seed(5))
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=CODES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Codebooks that shrink fast: 2 bits are near enough to 4 to be accepted often, not always."""
    sizes = {"bytes": (1, 0.5, 0.075, 0.0375), "trellis": (1, 0.25, 0.12)}
    out = write_checkpoint(
        tmp_path_factory.mktemp("speculate") / "out",
        tiny_llama(2, max_position_embeddings=512),
        code=request.param,
        sizes=sizes[request.param],
    )
    return dropbydrop.load(out)


# ------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("k", [1, 3, MAX_DRAFT, None])
def test_greedy_output_is_that_of_plain_decoding(model: Any, k: int | None) -> None:
    fast = Speculator(model, 2, draft_tokens=k)
    for prompt in PROMPTS:
        for length in (1, 2, 40):
            plain = model.generate(prompt, max_new_tokens=length, **GREEDY)
            assert torch.equal(fast.generate(prompt, max_new_tokens=length, **GREEDY), plain)
    report = fast.report
    assert report.tokens == plain.shape[1] - 7
    if k is not None:
        assert 0 < report.accepted < report.drafted
        assert (report.draft_bits, report.bits, report.k) == (2, 4, k)
        assert report.predicted == pytest.approx(
            Costs(report.a, report.c, (report.v - 1) / k).speedup(k)
        )


def test_the_end_token_ends_it(model: Any) -> None:
    plain = model.generate(PROMPTS[0], max_new_tokens=30, **GREEDY)
    eos = int(plain[0, 20])
    settings = {**GREEDY, "eos_token_id": eos, "max_new_tokens": 30}
    expected = model.generate(PROMPTS[0], **settings)
    found = Speculator(model, 2, draft_tokens=6).generate(PROMPTS[0], **settings)
    assert torch.equal(found, expected)
    assert found[0, -1] == eos


def test_processors_are_applied_to_draft_and_verification(model: Any) -> None:
    settings = {**GREEDY, "max_new_tokens": 30, "repetition_penalty": 1.5}
    plain = model.generate(PROMPTS[1], **settings)
    assert not torch.equal(plain, model.generate(PROMPTS[1], max_new_tokens=30, **GREEDY))
    fast = Speculator(model, 2, draft_tokens=4)
    assert torch.equal(fast.generate(PROMPTS[1], **settings), plain)


def test_a_plan_can_draft_and_be_verified(model: Any) -> None:
    checkpoint = store_of(model).checkpoint
    names = [input_group.name for input_group in checkpoint.quantization.input_groups]
    base = Plan.uniform(checkpoint, 2)
    draft = Plan(base.checkpoint, {n: 2 + (i % 2) for i, n in enumerate(names)})
    full = Plan(base.checkpoint, {n: 4 - (i % 3 == 0) for i, n in enumerate(names)})
    view = dropbydrop.view(model, plan=full)
    plain = view.generate(PROMPTS[2], max_new_tokens=30, **GREEDY)
    fast = Speculator(view, plan=draft, draft_tokens=4)
    assert torch.equal(fast.generate(PROMPTS[2], max_new_tokens=30, **GREEDY), plain)
    assert fast.report.bits == pytest.approx(full.average_bits(checkpoint))


def uniforms(model: Any, draft: Any, ids: torch.Tensor, given: int, temperature: float) -> Any:
    """Randomised probability transform of every new token: i.i.d. uniform iff it was drawn from
    the model's conditional distribution. Tokens are ordered by draft / model, so that a sampler
    that leans to the draft gives values that lean to one side."""
    with torch.no_grad():
        rows = slice(given - 1, -1)
        p = (model(ids).logits[0, rows].double() / temperature).softmax(-1)
        q = (draft(ids).logits[0, rows].double() / temperature).softmax(-1)
    order = (q / p).argsort(-1)
    ranked = p.gather(1, order)
    place = (order == ids[0, given:, None]).double().argmax(-1, keepdim=True)
    below = (ranked.cumsum(-1) - ranked).gather(1, place)
    noise = torch.rand(place.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (below + noise * ranked.gather(1, place))[:, 0]


def distance(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance to the uniform distribution, times sqrt(n)."""
    n = values.numel()
    values, grid = values.sort().values, torch.arange(n + 1, dtype=torch.float64) / n
    worst = max(float((values - grid[:-1]).max()), float((grid[1:] - values).max()))
    return worst * n**0.5


def test_sampling_keeps_the_distribution(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """P(statistic > 2.2) = 1.3e-4 for the right distribution; the draft alone is far above."""
    monkeypatch.setattr(speculate, "PLAIN", 0)
    draft, temperature, length = dropbydrop.view(model, 2), 0.3, 200
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings |= {"max_new_tokens": length, "min_new_tokens": length, "eos_token_id": None}
    fast = Speculator(model, 2, draft_tokens=3)
    found: dict[str, list[torch.Tensor]] = {"fast": [], "draft": []}
    accepted = 0
    for i, prompt in enumerate(PROMPTS[:3]):
        for name, run in (("fast", fast.generate), ("draft", draft.generate)):
            torch.manual_seed(i)
            ids = run(prompt, pad_token_id=0, **settings)
            assert ids.shape == (1, 7 + length)
            found[name].append(uniforms(model, draft, ids, 7, temperature))
        accepted += fast.report.accepted
        assert fast.report.rounds > 40
    assert accepted > 50
    assert distance(torch.cat(found["fast"])) < 2.2
    assert distance(torch.cat(found["draft"])) > 3


# ----------------------------------------------------------------------------- measurement


def test_the_formula_against_a_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    for a, c, v, k in [
        (0.8, 0.3, 1.2, 4),
        (0.3, 0.6, 1.1, 2),
        (1.0, 0.5, 1.5, 5),
        (0.0, 0.5, 1, 1),
    ]:
        hits = torch.rand(20000, k, generator=generator) < a
        tokens = hits.double().cumprod(1).sum(1) + 1
        found = Costs(a, c, (v - 1) / k).speedup(k)
        assert found == pytest.approx(float(tokens.mean()) / (k * c + v), rel=0.02)
    assert Costs(0.9, 0.5, 0.0).speedup(0) == 1.0


def test_the_choice_of_k() -> None:
    assert Costs(0.9, 0.9, 0.2).best() == 0  # a draft as dear as the model never pays
    assert Costs(0.2, 0.5, 0.0).best() == 0
    assert Costs(0.5, 0.25, 0.0).best() == 1
    assert Costs(0.95, 0.1, 0.01).best() > 5
    assert Costs(0.8, 0.2, 0.02).speedup(Costs(0.8, 0.2, 0.02).best()) > 1.5


def rehearse(a: float, c: float, slope: float, rounds: int, seed: int = 0) -> Speedometer:
    """A generation without a model: rounds with the costs and acceptance given."""
    meter, generator = Speedometer(), torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        k = meter.next_k()
        hits = (torch.rand(k, generator=generator) < a).double().cumprod(0)
        noise = 1 + 0.05 * float(torch.randn((), generator=generator))
        draft, verify = 0.01 * c * k * noise, 0.01 * (1 + slope * k) * noise
        if len(meter.rounds) == 0:
            verify *= 50  # the prompt
        if k and not meter.drafts:
            draft *= 50
        meter.rounds.append(Round(k, int(hits.sum()), draft, verify))
    return meter


def test_k_settles_where_the_formula_has_its_best() -> None:
    for a, c, slope in ((0.85, 0.3, 0.03), (0.7, 0.2, 0.1)):
        meter = rehearse(a, c, slope, 400)
        best = Costs(a, c, slope).best()
        assert abs(meter.next_k() - best) <= 1
        report = SpeculationReport(2, 4, **meter.figures())
        assert report.a == pytest.approx(a, abs=0.05)
        assert report.c == pytest.approx(c, rel=0.05)
        assert report.predicted == pytest.approx(report.measured, rel=0.1)
        assert report.plain_seconds == pytest.approx(0.01, rel=0.1)
        assert not report.switched_off


def test_drafting_that_does_not_pay_is_switched_off() -> None:
    meter = rehearse(0.3, 0.8, 0.1, 60)
    assert meter.off
    assert meter.next_k() == 0
    assert len(meter.drafts) == PROBES + 1
    assert [r.k for r in meter.rounds[: PLAIN + 1]] == [0] * (PLAIN + 1)
    assert all(r.k == 0 for r in meter.rounds[PLAIN + PROBES + 2 :])


def test_it_switches_itself_off_in_a_generation(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Costs, "speedup", lambda self, k: 1.0 if k == 0 else 0.9)
    fast = Speculator(model, 2)
    plain = model.generate(PROMPTS[0], max_new_tokens=40, **GREEDY)
    assert torch.equal(fast.generate(PROMPTS[0], max_new_tokens=40, **GREEDY), plain)
    assert fast.report.switched_off
    assert fast.report.rounds == PROBES + 1


# ------------------------------------------------------------------------------------ use


def test_views_are_left_alone(model: Any) -> None:
    settings = dict(vars(model.generation_config))
    plain = model.generate(PROMPTS[0], max_new_tokens=24, **GREEDY)
    one, two = Speculator(model, 2, draft_tokens=4), Speculator(model, 3, draft_tokens=2)
    results: list[bool] = []

    def work(run: Any) -> None:
        for _ in range(2):
            results.append(torch.equal(run(PROMPTS[0], max_new_tokens=24, **GREEDY), plain))

    runs = (one.generate, two.generate, one.generate, model.generate)
    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert vars(model.generation_config) == settings
    assert "_get_candidate_generator" not in vars(model)
    codes = model.model.layers[0].mlp.up_proj.codes[1].data_ptr()
    for view in (one.draft, one.model):
        assert view.model.layers[0].mlp.up_proj.codes[1].data_ptr() == codes


def test_what_cannot_be_drafted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (4, 3):
        with pytest.raises(PrecisionError, match="the draft must have fewer bits"):
            Speculator(dropbydrop.view(model, 3), bits)
    with pytest.raises(PrecisionError, match="it has 2, 3, 4"):
        Speculator(model, 1)
    with pytest.raises(DropError, match="1 to 12"):
        Speculator(model, 2, draft_tokens=0)
    with pytest.raises(DropError, match="was not loaded from a dropbydrop"):
        Speculator(tiny_llama(), 2)
    fast = Speculator(model, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_is_stateful", True)  # as recurrent families say of themselves
        with pytest.raises(DropError, match="a state that cannot go back"):
            Speculator(model, 2)
    with pytest.raises(DropError, match="takes one"):
        fast.generate(PROMPTS[:2, 0])
    with pytest.raises(DropError, match="no beams"):
        fast.generate(PROMPTS[0], num_beams=2)


def test_the_command(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(store_of(model).checkpoint.path)

    def run(*argv: object) -> tuple[int, str, str]:
        old, sys.argv = sys.argv, ["dropbydrop", "generate", str(folder), *map(str, argv)]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.argv = old
        return code, *capsys.readouterr()

    same = ("--prompt", "hello there", "--max-new-tokens", 24, "--json")
    plain = json.loads(run(*same)[1].splitlines()[-1])
    code, stdout, _ = run(*same, "--draft-bits", 2)
    fast = json.loads(stdout.splitlines()[-1])
    assert code == 0
    assert fast["text"] == plain["text"]
    assert plain["speculation"] is None
    assert (fast["speculation"]["draft_bits"], fast["speculation"]["bits"]) == (2, 4)
    code, _, stderr = run(*same, "--bits", 2, "--draft-bits", 3)
    assert code == 2
    assert "fewer bits" in stderr
