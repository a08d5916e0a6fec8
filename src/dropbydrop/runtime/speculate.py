"""Self-speculative decoding: a low prefix drafts, the full prefix verifies, one set of weights.

Leviathan, Kalman and Matias (arXiv 2211.17192). A round drafts k tokens with a view of few planes
and verifies them in one forward pass of k + 1 rows; the longest agreeing prefix and one token more
are kept. The loop is that of transformers (`generate(assistant_model=...)`). Ours is the candidate
generator, which measures costs as it goes and chooses k before every round (docs/speculation.md):

    1. the first round (the prompt) and PLAIN more rounds draft nothing: they time the plain step;
    2. PROBES rounds of 3 tokens estimate what a draft and a verification cost;
    3. from then on k is that of the best predicted speed in 1..MAX_DRAFT. Where even the best is
       below 1, nothing is drafted any more in this generation.
Costs are medians of wall-clock time, all overhead included. A choice of k never looks at the tokens
that it is about, so it does not change the distribution.

Two views are private to a `Speculator`, so other views of the store run undisturbed beside it.
Limits: one sequence at a time. Exactness of greedy decoding needs logits that do not depend on the
number of rows: our kernels give that for the quantized matrices; where other operations round
differently, a tie within rounding may be broken the other way.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers.generation import AssistedCandidateGenerator

from dropbydrop.planning.plan import Plan
from dropbydrop.planning.precision import Precision
from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError, PrecisionError

from .views import plan_of, precision, store_of, view

MAX_DRAFT = 12  # few enough rows for the kernels' batch-invariant path
PLAIN = 3  # rounds without a draft that time the plain step
PROBES = 4  # rounds with a draft before k is chosen
_PROBE_DRAFT = 3
_RECENT = 64  # rounds that medians run over


@dataclass(frozen=True)
class Costs:
    """What decides about drafting, in units of a plain step.

    Attributes:
        a: acceptance, the share of the drafted tokens that were tried and kept, 0..1.
        c: cost of drafting a token.
        slope: of a verification, v(k) = 1 + slope * k: rows cost about the same each.
    """

    a: float
    c: float
    slope: float

    def v(self, k: int) -> float:
        """Cost of a verification of k drafted tokens."""
        return max(1.0 + self.slope * k, 1e-6)

    def speedup(self, k: int) -> float:
        """s(k), the predicted speed relative to plain decoding (Leviathan et al., theorem 3.8)."""
        tokens = k + 1.0 if self.a >= 1 else (1 - self.a ** (k + 1)) / (1 - self.a)
        return tokens / (k * self.c + self.v(k))

    def best(self) -> int:
        """The k of 0..MAX_DRAFT that is predicted to be fastest; 0 when drafting does not pay."""
        return max(range(MAX_DRAFT + 1), key=lambda k: (self.speedup(k), -k))


@dataclass(frozen=True)
class SpeculationReport:
    """What a generation did and how fast. Costs are in plain steps; None before they are known.

    Attributes:
        draft_bits, bits: precisions of draft and verification.
        tokens, seconds: new tokens, and the time of the whole generation.
        rounds, drafted, accepted: verifications that had a draft, and their tokens. The last round
            of a generation is left out here and below: the end cuts it.
        k: draft length, the last chosen. a, c, v: acceptance, draft cost, verification cost at k.
        plain_seconds: a plain step.
        predicted: s(k) of the formula. measured: tokens * plain step / time, over the rounds with
            a draft, the probes included.
        switched_off: drafting was given up because it did not pay.
    """

    draft_bits: int | float
    bits: int | float
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    k: int = 0
    a: float | None = None
    c: float | None = None
    v: float | None = None
    plain_seconds: float | None = None
    predicted: float | None = None
    measured: float | None = None
    switched_off: bool = False


@dataclass
class Round:
    """One verification: k drafted, n accepted, seconds of either part."""

    k: int
    accepted: int
    draft: float
    verify: float


@dataclass
class Speedometer:
    """Measurements of one generation, and the choice of k. No torch in here."""

    fixed: int | None = None  # always this k, instead of choosing
    rounds: list[Round] = field(default_factory=list)
    off: bool = False

    def next_k(self) -> int:
        """Draft length of the round that begins now."""
        # The prompt and some plain steps come first: without them there is nothing to compare with.
        if self.off or len(self.rounds) <= PLAIN:
            return 0
        if self.fixed is not None:
            return self.fixed
        # the first draft also reads the prompt, so it tells nothing about costs
        if len(self.drafts) <= PROBES:
            return _PROBE_DRAFT
        costs = self.costs()
        k = costs.best() if costs else 0
        self.off = k == 0
        return k

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step."""
        steps = [r.verify for r in self.rounds[1:] if r.k == 0]
        return median(steps[-_RECENT:]) if steps else None

    @property
    def drafts(self) -> list[Round]:
        """Rounds that drafted."""
        return [r for r in self.rounds if r.k]

    def costs(self) -> Costs | None:
        """a, c and v as measured so far; None before there is anything to go by."""
        step, rounds = self.plain, self.drafts[1:]
        if not step or not rounds:
            return None
        kept = sum(r.accepted for r in rounds)
        tried = kept + sum(r.accepted < r.k for r in rounds)
        recent = rounds[-_RECENT:]
        c = median(r.draft / r.k for r in recent) / step
        slope = median((r.verify / step - 1) / r.k for r in recent)
        return Costs(kept / tried, c, slope)

    def figures(self) -> dict[str, Any]:
        """What was measured, by the names of a `SpeculationReport`."""
        rounds, step, costs = self.drafts, self.plain, self.costs()
        found = {
            "rounds": len(rounds),
            "drafted": sum(r.k for r in rounds),
            "accepted": sum(r.accepted for r in rounds),
            "plain_seconds": step,
            "switched_off": self.off,
        }
        if costs is None or step is None:
            return found
        k = self.fixed or max(1, costs.best())
        kept = sum(r.accepted + 1 for r in rounds[1:])
        measured = kept * step / sum(r.draft + r.verify for r in rounds[1:])
        same = [r.verify for r in rounds[1:] if r.k == k]
        v = median(same[-_RECENT:]) / step if same else costs.v(k)
        found |= {"k": k, "a": costs.a, "c": costs.c, "v": v, "measured": measured}
        return found | {"predicted": replace(costs, slope=(v - 1) / k).speedup(k)}


class _Drafter(AssistedCandidateGenerator):
    """transformers' candidate generator with a stopwatch and a draft length chosen each round."""

    def __init__(self, meter: Speedometer, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.meter = meter
        self._open: tuple[int, int, float, float] | None = None  # k, length, draft seconds, since

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        self._finish(input_ids.shape[1])
        start = time.perf_counter()
        self.num_assistant_tokens = self.meter.next_k()
        if self.num_assistant_tokens and self.assistant_kwargs.get("past_key_values") is None:
            self._catch_up(input_ids.shape[1])
        ids, scores = super().get_candidates(input_ids, **kwargs)
        now, drafted = time.perf_counter(), ids.shape[1] - input_ids.shape[1]
        self._open = (drafted, input_ids.shape[1], now - start, now)
        return ids, scores

    def _catch_up(self, length: int) -> None:
        """The first draft reads the prompt and what was decoded since without a draft."""
        self.assistant_kwargs.pop("position_ids", None)  # those of the prompt; made anew
        mask = self.assistant_kwargs.get("attention_mask")
        if mask is not None:
            more = mask.new_ones((mask.shape[0], length - mask.shape[1]))
            self.assistant_kwargs["attention_mask"] = torch.cat([mask, more], dim=1)

    def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the length is chosen by `Speedometer`."""

    def _finish(self, length: int) -> None:
        """Close the round that is open; `length` tokens are there now."""
        if self._open is not None:
            k, before, draft, since = self._open
            took = time.perf_counter() - since
            self.meter.rounds.append(Round(k, max(length - before - 1, 0), draft, took))
            self._open = None


class Speculator:
    """Generates with a model, drafting with a view of fewer planes of the same store.

        fast = Speculator(model, 2)
        ids = fast.generate(**tokenizer("…", return_tensors="pt"), max_new_tokens=100)
        print(fast.report)

    One generation at a time (others wait); make one Speculator a thread, they share all weights.

    Args:
        model: a loaded model or view; it is not touched.
        bits, avg_bits, plan: precision of the draft: fewer bits than the model has.
        draft_tokens: always draft so many, instead of choosing by measurement.

    Raises:
        PrecisionError: the draft is no lower precision of the model.
        DropError: a model that cannot be assisted.
    """

    def __init__(
        self,
        model: Any,
        bits: int | None = None,
        *,
        avg_bits: float | None = None,
        plan: Plan | None = None,
        draft_tokens: int | None = None,
    ) -> None:
        draft = Precision(bits, avg_bits, plan)
        if draft_tokens is not None and not 1 <= draft_tokens <= MAX_DRAFT:
            raise DropError(f"{draft_tokens} draft tokens; give 1 to {MAX_DRAFT}, or none.")
        checkpoint, asked = store_of(model).checkpoint, bits or avg_bits
        if plan is not None:
            asked = plan.check(checkpoint).average_bits(checkpoint)
        if asked is not None and asked >= precision(model):
            raise PrecisionError(
                f"a draft of {asked} bits for a model of {precision(model)}: the draft must have "
                "fewer bits, or it saves nothing."
            )
        if getattr(model, "_is_stateful", False):  # tokens cannot be taken back from its cache
            raise DropError(
                f"{type(model).__name__} keeps a state that cannot go back, so that drafts cannot "
                "be refused: generate without a draft."
            )
        self.draft = view(model, **vars(draft))
        self.model = view(model, plan=plan_of(model))
        self.draft_tokens = draft_tokens
        self.report = SpeculationReport(precision(self.draft), precision(model))
        self._lock = threading.Lock()
        config = self.draft.generation_config
        config.num_assistant_tokens_schedule = "constant"
        config.assistant_confidence_threshold = 0.0  # a draft is as long as was chosen

    def generate(self, input_ids: Tensor, **settings: Any) -> Any:
        """`model.generate` with the same result (see the module's note), and a new `report`.

        Args:
            input_ids: [1, T]. settings: as for transformers' `generate`.

        Raises:
            DropError: more than one sequence, or beams.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1:
            raise DropError(
                f"{input_ids.shape[0]} sequences at once: speculative decoding takes one. Give "
                "them one by one, or decode without a draft."
            )
        if settings.get("num_beams", 1) != 1 or settings.get("num_return_sequences", 1) != 1:
            raise DropError("speculative decoding has no beams and returns one sequence.")
        meter = Speedometer(self.draft_tokens)

        def drafter(**arguments: Any) -> _Drafter:
            names = ("target_tokenizer", "assistant_tokenizer")
            kept = {name: value for name, value in arguments.items() if name not in names}
            return _Drafter(meter, **kept)

        with self._lock, quiet_transformers():
            # This view is ours alone, so nobody else's generation gets our candidate generator.
            self.model._get_candidate_generator = drafter
            start = time.perf_counter()
            output = self.model.generate(input_ids, assistant_model=self.draft, **settings)
            seconds = time.perf_counter() - start
            ids: Tensor = output if isinstance(output, Tensor) else output.sequences
            tokens = ids.shape[1] - input_ids.shape[1]
            before = self.report
            self.report = SpeculationReport(
                before.draft_bits, before.bits, tokens, seconds, **meter.figures()
            )
        return output
