"""Spot checks of a trunk: a random share of its answers is computed again here, layer by layer from the checkpoint.

    checks = SpotChecks(share, plan, reference, dtype)
    session = SessionChecks(checks, max_length, form)
    session.look(position, rows, answer, sent)  # for each answer: most return at once
    session.result()                            # waits for the checks under way

One answer of each 1 / share is checked, at a random place among them. Nobody but this process knows which. A check
needs the keys and values of all positions before. The reference computes them from the hidden states that the session
has sent, each position once. One thread does this, with one thread of torch and the lowest priority, while the answer
goes on.
"""

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from splitlearn.events import Mismatch, SpotCheckResult
from splitlearn.kvcache.layers import dynamic
from splitlearn.models.plan import SplitPlan
from splitlearn.stages.base import StageInput
from splitlearn.stages.local import LocalStage
from splitlearn.stages.session import LocalSession
from splitlearn.stages.settings import SessionSettings
from splitlearn.wire.hidden_states import Rows

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""What rounding explains, relative to the norm of a row. docs/trust.md has the measured errors behind it."""
WIRE_ROUNDINGS = 1.5
"""The tolerance for what the wire's form rounds, in what it rounds of the reference's own row."""
_computing = threading.Lock()
_SETTINGS = SessionSettings(new_cache=dynamic, gradient_guard=torch.inference_mode)


class SpotChecks:
    """The checks of one trunk's answers. `reference` loads the trunk's layers, when the first answer is checked.

    `dtype` is the least precise one in which the trunk multiplies.
    """

    def __init__(self, share: float, plan: SplitPlan, reference: Callable[[], LocalStage], dtype: torch.dtype) -> None:
        self.plan = plan
        self.reference = cache(reference)
        """The trunk's layers; only the thread of the checks asks."""
        self._tolerance = TOLERANCE[dtype]
        self._every, self._seen, self._chosen = max(1, round(1 / share)), 0, 0
        self._lock = threading.Lock()
        self.thread = ThreadPoolExecutor(1, "spot-checks", _at_low_priority)

    def chooses(self) -> bool:
        """Whether the next answer is one to check: a random one of each `1 / share`."""
        with self._lock:
            if self._seen == 0:
                self._chosen = secrets.randbelow(self._every)
            chosen = self._seen == self._chosen
            self._seen = (self._seen + 1) % self._every
        return chosen

    def compare(self, own: Tensor, found: Tensor, form: Rows) -> tuple[float, float]:
        """The largest error of a row of `found` [1, T, H], and its tolerance, both relative to the norm of the row."""
        own, found = own[0].double(), found[0].double()
        sent = form.from_bytes(form.to_bytes(own.float().unsqueeze(0)), own.shape[-1])[0].double()
        norms = own.norm(dim=-1)
        errors = (found - own).norm(dim=-1) / norms
        allowed = self._tolerance + WIRE_ROUNDINGS * (sent - own).norm(dim=-1) / norms
        at = int((errors / allowed).argmax())
        return float(errors[at]), float(allowed[at])

    def close(self) -> None:
        """End the thread, and drop the checks that have not begun."""
        self.thread.shutdown(wait=False, cancel_futures=True)


class SessionChecks:
    """The checks of one session, whose hidden states have this `form` on the wire. The reference has its own KV cache
    of it, from the first check on."""

    def __init__(self, checks: SpotChecks, max_length: int, form: Rows) -> None:
        self._checks, self._max_length, self._form = checks, max_length, form
        self._computed = 0  # positions that the reference has, or has been given
        self._under_way: list[Future[Mismatch | None]] = []
        self._session: LocalSession | None = None

    def truncate(self, position: int) -> None:
        """The session's next step begins at `position`."""
        self._computed = min(self._computed, position)

    def look(self, position: int, rows: bytes, answer: Tensor, sent: bytearray, rope_length: int) -> None:
        """Check this `answer` [1, T, H] if it is chosen. It is to the `rows` at `position` of all that was `sent`. A
        step that was dropped has no answer."""
        if not answer.shape[1] or not self._checks.chooses():
            return
        size = len(rows) // answer.shape[1]
        end = position * size + len(rows)
        if sent[position * size : end] != rows:
            return  # a later step is under way, which replaces this one
        x = self._form.from_bytes(bytes(sent[self._computed * size : end]), answer.shape[2])
        self._under_way.append(self._checks.thread.submit(self._check, self._computed, x, answer.clone(), rope_length))
        self._computed = position + answer.shape[1]

    def result(self) -> SpotCheckResult:
        """How many answers were checked so far, and which were wrong. Waits for the checks under way."""
        found = [each.result() for each in self._under_way]
        return SpotCheckResult(len(found), tuple(each for each in found if each is not None))

    def close(self) -> None:
        """Drop the checks that have not begun, and the reference's KV cache."""
        for each in self._under_way:
            each.cancel()
        self._session = None

    def _check(self, position: int, x: Tensor, answer: Tensor, rope_length: int) -> Mismatch | None:
        """Give the reference the rows `x` [1, T, H] from `position` on. `answer` [1, t, H] is the trunk's to the last
        of them."""
        # The checks of a chain's servers take turns: while one loads its layers, transformers makes every new parameter
        # of this process an empty one.
        with _computing:
            reference = self._checks.reference()
            if self._session is None:
                self._session = reference.open(_SETTINGS, self._max_length)
            item = StageInput(self._session, position, x.to(reference.dtype), rope_length=rope_length)
            (output,) = reference.step([item])
        tokens = answer.shape[1]
        error, allowed = self._checks.compare(output.x[:, -tokens:], answer, self._form)
        if error <= allowed:
            return None
        plan, end = self._checks.plan, position + x.shape[1]
        return Mismatch((plan.start, plan.end), end - tokens, tokens, error, allowed)


def _at_low_priority() -> None:
    """Called in the thread of the checks. On Linux a thread has a priority of its own."""
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
