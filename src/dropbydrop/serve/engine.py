"""The worker that owns the model: many requests in turn, each at its own precision, on one store.

    engine = Engine(Precisions("out", (2, 3, 4)), target=20.0, queue=32)
    engine.start()
    engine.submit([job])        # its events come by job.emit
    engine.stop()

One thread runs the model. In a round every running job computes one token, and at most one job a
chunk of its prompt, so that a long prompt delays a token of the others by one chunk. Products of a
token are bound by memory, and so take the machine as a whole: threads beside each other would gain
nothing, and a job alone gets everything. For the same reason jobs share a pass over the weights,
each at its own precision, where the model has the native step; where tuned scales keep levels
apart, those at one precision do. So do those of other models, in a batch through torch for each
precision (`runtime.torch_batch`), if their caches allow it; else jobs take turns.

Jobs wait in one queue, first come first served, until `shed.Ladder` says that there is room, and
there is memory for their caches. How long a text becomes nobody knows before, so what is foreseen
is little, and where caches outgrow their memory the youngest job is parked: it gives its cache away
and waits as the first of the queue. A job that was cancelled is dropped before its next turn,
whether it waits or runs.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from dropbydrop.runtime.torch_batch import TorchBatch, fitting
from dropbydrop.system.errors import DropError, NumericError

from .caches import KeptCaches, free_memory
from .job import Job, advance
from .metrics import Counters
from .precisions import Precisions
from .shed import DEFAULT, PINNED, Costs, Ladder, Load, level_at

log = logging.getLogger("dropbydrop")
MOST_RUNNING = 16
_PERIOD = 5.0  # seconds that tokens a second are counted over


class Saturated(Exception):
    """No room; try again after `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Stopped(Exception):
    """The worker has ended."""


class Engine:
    """See the module's note. `submit`, `status` and `stop` may be called from any thread."""

    def __init__(self, precisions: Precisions, target: float | None, queue: int) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            target: tokens a second that each request should get at least; None is no target.
            queue: requests that may wait.
        """
        self.precisions, self.queue = precisions, queue
        self.counters = Counters()
        self._ladder = Ladder(precisions.levels, target)
        self._kept = KeptCaches()
        # the caches of all that run take at most half of the memory that is free now
        self._device = precisions.base.device
        self._most_tokens = free_memory(self._device) // 2 // precisions.cache_bytes
        self._batches: dict[tuple[float, int], TorchBatch] = {}  # one for each pass
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._stopping = False
        self._job_seconds = 1.0
        self._beside = self._stepping = 0.0  # seconds of rounds; of this round's steps
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)  # (when, tokens of a round)
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="dropbydrop-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """End the worker after its present turn; all jobs fail with 503."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs done, all of them or none.

        Raises:
            Saturated: too many wait already.
            Stopped: the worker has ended.
        """
        with self._wake:
            if not self.alive:
                raise Stopped
            waiting = [job for job in self._waiting if not job.cancelled]
            if self._left_waiting([*waiting, *jobs]) > self.queue:
                self.counters.rejected += 1
                raise Saturated(self._wait_seconds(len(waiting)))
            self._waiting.extend(jobs)
            self.counters.requests += 1
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs before their next turn; harmless for finished ones."""
        for job in jobs:
            job.cancelled = True
        with self._wake:
            self._wake.notify()

    # ---- what others may look at -----------------------------------------------------------

    def level(self) -> float:
        """The level that a new `auto` request would get now."""
        return self._ladder.rung[1]

    def status(self) -> dict[str, Any]:
        """Queue, rates and levels, as in /status.json."""
        now = time.monotonic()
        recent = sum(n for when, n in list(self._recent) if now - when <= _PERIOD)
        costs, counters = self.precisions.costs(), self.counters
        return {
            "queue": len(self._waiting),
            "running": len(self._running),
            "capacity": MOST_RUNNING + self.queue,
            "level": self.level(),
            "target_tps": self._ladder.target,
            "levels": [
                {
                    "bits": p,
                    "seconds_per_token": costs.seconds.get(p),
                    "bytes_per_token": self.precisions.bytes_of(p),
                }
                for p in self.precisions.levels
            ],
            "tokens_per_second": recent / _PERIOD,
            "shed": {"moved_down": counters.moved_down, "rejected": counters.rejected},
            "uptime": now - self._started,
        }

    def _costs(self) -> Costs:
        return replace(self.precisions.costs(), beside=self._beside)

    def _left_waiting(self, jobs: Sequence[Job]) -> int:
        """How many of these would have to wait."""
        running, costs = list(self._running), self._costs()
        for n, job in enumerate(jobs):
            if not self._room(running, job, costs):
                return len(jobs) - n
            running.append(job)
        return 0

    def _room(self, running: Sequence[Job], job: Job, costs: Costs) -> bool:
        """Whether a job can run beside these, within the target and the memory for caches."""
        if not running:
            return True
        return (
            len(running) < MOST_RUNNING
            and self._tokens([*running, job]) <= self._most_tokens
            and self._ladder.room([other.load for other in running], job.load, costs)
        )

    def _tokens(self, jobs: Sequence[Job]) -> int:
        """Tokens that the caches of jobs have room for."""
        foreseen = [job.foreseen for job in jobs]
        if not self.precisions.batched:
            return sum(foreseen)
        rows, columns = fitting(foreseen)
        return rows * columns + max(foreseen)  # and the cache of a prompt that is read

    def _held(self) -> int:
        """Tokens that the caches of running jobs have memory for after the next round."""
        if not self.precisions.batched:
            return sum(job.room for job in self._running)
        held = sum(job.room for job in self._running if job.prompting)
        for key, jobs in self._passes().items():
            now = math.prod(self._batches[key].shape) if key in self._batches else 0
            held += max(now, math.prod(fitting([job.length + 1 for _, job in jobs])))
        return held

    def _passes(self) -> dict[tuple[float, int], list[tuple[float, Job]]]:
        """The jobs that generate, with their precisions, by the pass that they may share."""
        passes: dict[tuple[float, int], list[tuple[float, Job]]] = {}
        for job in self._running:
            if not job.prompting and not job.cancelled:
                bits = level_at(self._ladder.rung, job.load)
                key = self.precisions.pass_of(bits, job.length + 1)
                passes.setdefault(key, []).append((bits, job))
        return passes

    def _wait_seconds(self, waiting: int) -> int:
        rounds = (waiting + 1) / max(len(self._running), 1)
        return max(1, min(60, math.ceil(rounds * self._job_seconds)))

    # ---- the worker's thread -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            with torch.inference_mode(), _current(self._device):
                while self._admitted():
                    self._round()
        except BaseException:  # of no request: whoever waits must not wait for ever
            log.exception("the worker failed")
        with self._wake:
            self._stopping = True
        for job in [*self._running, *self._waiting]:
            with suppress(BaseException):
                job.fail(503, "the server is shutting down")
        self._running.clear()
        self._waiting.clear()
        self._batches.clear()

    def _admitted(self) -> bool:
        """Wait until there is something to do, and let in what can run; False at the end."""
        with self._wake:
            while not (self._waiting or self._running or self._stopping):
                self._wake.wait()
            if not self._stopping:
                self._admit()
            return not self._stopping

    def _admit(self) -> None:
        """Let waiting jobs run while there is room. Called with the lock held."""
        costs, waiting = self._costs(), len(self._waiting)
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self.counters.cancelled += waiting - len(self._waiting)
        while self._waiting:
            job = self._waiting[0]
            crowded = self._running and self._held() + job.room > self._most_tokens
            if crowded or not self._room(self._running, job, costs):
                break
            self._waiting.popleft()
            self._running.append(job)
            loads = [other.load for other in self._running]
            self._ladder.update(loads, costs, time.monotonic())
            if job.fixed_at_start and not job.switches:
                job.load = Load(level_at(self._ladder.rung, replace(job.load, may=DEFAULT)), PINNED)

    def _round(self) -> None:
        """One token of every running job, and one chunk of the first prompt that is unread."""
        before, start, self._stepping = self.counters.tokens, time.perf_counter(), 0.0
        loads = [job.load for job in self._running]
        self._ladder.update(loads, self._costs(), time.monotonic())
        self._park()
        reading = next((job for job in self._running if job.prompting), None)
        passes = self._passes()
        for job in self._running:
            if job.cancelled:
                job.close()
                self.counters.cancelled += 1
            elif job is reading:
                self._turn(job)
        for key, rows in passes.items():
            self._step(key, rows)
        self._batches = {key: batch for key, batch in self._batches.items() if len(batch)}
        if passes:
            self._note_beside(time.perf_counter() - start - self._stepping)
        with self._wake:
            self._running = [job for job in self._running if not job.finished]
        self._recent.append((time.monotonic(), self.counters.tokens - before))

    def _park(self) -> None:
        """Have the youngest jobs wait where all caches would have more memory than there is."""
        with self._wake:
            while len(self._running) > 1 and self._held() > self._most_tokens:
                job = self._running.pop()
                job.park()
                self._waiting.appendleft(job)
                self.counters.parked += 1

    def _note_beside(self, seconds: float) -> None:
        """Seconds of a round that were no steps, for the predictions of the ladder."""
        self._beside += 0.1 * (seconds - self._beside)

    def _step(self, key: tuple[float, int], rows: Sequence[tuple[float, Job]]) -> None:
        """The next token of jobs, each with its precision, in one pass if the model allows it."""
        ready: list[tuple[float, Job, Any]] = []
        for bits, job in rows:
            with self._failures_of([job]):
                ready.append((bits, job, self.precisions.model(bits)))
        shared, start, batch = False, time.perf_counter(), None
        if self.precisions.batched and ready:
            batch = self._batches.setdefault(key, TorchBatch())
        if batch is not None or len(ready) > 1:
            shared = self._advance([(job, model) for _, job, model in ready], batch)
        if shared:
            seconds = time.perf_counter() - start
            self._stepping += seconds
            self.precisions.measured([bits for bits, _, _ in ready], seconds)
        for bits, job, _ in ready:
            if job.finished:  # it failed
                continue
            if not shared:
                self._turn(job)
                continue
            with self._failures_of([job]):
                self._set_bits(job, bits)
                made = len(job.tokens)
                job.answer(self._kept)
                self._count(job, made)

    def _advance(self, ready: Sequence[tuple[Job, Any]], batch: TorchBatch | None) -> bool:
        """`advance`; where that fails for several jobs, each goes on alone, so that only those end
        that fail alone too. False: nothing was changed."""
        jobs, models = [job for job, _ in ready], [model for _, model in ready]
        if len(jobs) == 1:
            with self._failures_of(jobs):
                return advance(models, jobs, batch)
            return False
        try:
            return advance(models, jobs, batch)
        except BaseException:
            log.exception("a shared pass failed; its requests go on alone")
        if batch is not None:
            for one in ready:
                self._advance([one], TorchBatch())
        return batch is not None

    def _turn(self, job: Job) -> None:
        """A token of one job, or a chunk of its prompt."""
        with self._failures_of([job]):
            bits = level_at(self._ladder.rung, job.load)
            model = self.precisions.model(bits)
            self._set_bits(job, bits)
            prompting, made, start = job.prompting, len(job.tokens), time.perf_counter()
            job.turn(model, self._kept)
            if not prompting:
                seconds = time.perf_counter() - start
                self._stepping += seconds
                self.precisions.measured([bits], seconds)
            self._count(job, made)

    @contextmanager
    def _failures_of(self, jobs: Sequence[Job]) -> Iterator[None]:
        """End these jobs, and nothing else, if what is done for them fails."""
        try:
            yield
        except DropError as error:  # an average that cannot be planned
            status = 500 if isinstance(error, NumericError) else 400
            for job in jobs:
                self._failed(job, status, str(error))
        except BaseException as error:  # a panic of tokenizers is no Exception
            log.exception("a request failed")
            for job in jobs:
                self._failed(job, 500, f"internal error: {type(error).__name__}")

    def _set_bits(self, job: Job, bits: float) -> None:
        higher = bits < job.bits
        if job.set_bits(bits):
            self.counters.moved_down += higher
            self.counters.moved_up += not higher

    def _count(self, job: Job, made: int) -> None:
        """Note what a job has got since it had `made` tokens."""
        self.counters.tokens += len(job.tokens) - made
        if job.finished:
            self._finished(job)

    def _finished(self, job: Job) -> None:
        self.counters.finished += 1
        self.counters.prompt_tokens += len(job.prompt)
        self._job_seconds += 0.2 * (job.seconds - self._job_seconds)

    def _failed(self, job: Job, status: int, message: str) -> None:
        self.counters.failed += 1
        with suppress(Exception):
            job.fail(status, message)
        job.close()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one of this thread, which kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
