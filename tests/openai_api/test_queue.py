"""The queue of requests, for any that come and go: it is bounded, interactive ones come first, batch ones come too."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitlearn.openai_api.queue import OWN_SHARE, Entry, Priority, RequestQueue

RUNNING, WAITING, MOST_ANSWERS = 8, 3, 10


class Queue(RuleBasedStateMachine):
    """Requests come, end and leave in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(RUNNING, WAITING)
        self.waiting: dict[Priority, list[Entry]] = {"interactive": [], "batch": []}
        self.running: dict[Priority, list[Entry]] = {"interactive": [], "batch": []}

    @rule(priority=st.sampled_from(("interactive", "batch")), answers=st.integers(1, MOST_ANSWERS))
    def comes(self, priority: Priority, answers: int) -> None:
        entry = Entry(priority, answers)
        if self.queue.is_full(entry):
            assert len(self.waiting[priority]) == WAITING
            return
        self.queue.add(entry)
        self.waiting[priority].append(entry)
        self.start()

    @precondition(lambda self: any(self.running.values()))
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        self.goes(data.draw(st.sampled_from([*self.running["interactive"], *self.running["batch"]])))

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        self.goes(data.draw(st.sampled_from([*self.waiting["interactive"], *self.waiting["batch"]])))

    def goes(self, entry: Entry) -> None:
        self.queue.remove(entry)
        for lines in (self.running, self.waiting):
            if entry in lines[entry.priority]:
                lines[entry.priority].remove(entry)
        self.start()

    def start(self) -> None:
        """Each that starts was the first of its priority."""
        for entry in self.queue.start():
            assert self.waiting[entry.priority].pop(0) is entry
            self.running[entry.priority].append(entry)

    def answers(self, priority: Priority) -> int:
        return sum(entry.answers for entry in self.running[priority])

    @invariant()
    def it_is_bounded(self) -> None:
        for priority in self.waiting:
            assert len(self.waiting[priority]) == self.queue.waiting(priority) <= WAITING
            assert self.answers(priority) <= RUNNING or len(self.running[priority]) == 1

    @invariant()
    def no_interactive_request_waits_for_batch_ones(self) -> None:
        for first in self.waiting["interactive"][:1]:
            assert self.answers("interactive") + first.answers > RUNNING
            assert self.running["interactive"]

    @invariant()
    def no_batch_request_starves(self) -> None:
        for first in self.waiting["batch"][:1]:
            assert self.answers("batch") + first.answers > RUNNING // OWN_SHARE
            assert self.running["batch"]

    @invariant()
    def batch_requests_have_what_interactive_ones_leave(self) -> None:
        if self.waiting["batch"] and not self.waiting["interactive"]:
            first = self.waiting["batch"][0]
            assert self.answers("batch") + self.answers("interactive") + first.answers > RUNNING


TestQueue = Queue.TestCase
