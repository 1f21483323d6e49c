"""The endpoint of the OpenAI protocol under the page's own port (`ui.api`). Its requests queue with the page's runs."""

import asyncio
from uuid import uuid4

from starlette.types import ASGIApp

from splitlearn.access.quota import Accounts
from splitlearn.openai_api.answers import Line
from splitlearn.openai_api.app import Endpoint
from splitlearn.openai_api.failures import RETRY_S, ApiError
from splitlearn.openai_api.queue import Entry
from ui.compare.actions import Handlers
from ui.guard.hosts import Hosts
from ui.line import POLL_S

MEASURING = "An experiment is being measured, which a request would disturb; try again when it has ended."


def application(handlers: Handlers, hosts: Hosts, accounts: Accounts) -> ASGIApp:
    """The endpoint, under the page's names and with these keys."""
    return Endpoint(handlers.startup, PageLine(handlers)).application(hosts.has, accounts)


class PageLine(Line):
    """The queue of requests, whose first one queues with the page's runs: one at a time runs, as everywhere here where
    figures are shown."""

    def __init__(self, handlers: Handlers) -> None:
        super().__init__(1, handlers.runs.config.api.max_waiting)
        self._handlers = handlers
        self._names: dict[Entry, str] = {}

    async def enter(self, entry: Entry) -> None:
        """Wait for one's turn. Raises ApiError where too many wait, or an experiment is measured."""
        await super().enter(entry)
        line, name = self._handlers.line, uuid4().hex
        self._names[entry] = name
        line.join_as_request(name)
        try:
            while line.place(name):
                await asyncio.sleep(POLL_S)
            if self._handlers.lab.job.running:
                raise ApiError(503, MEASURING, code="measuring", headers={"Retry-After": str(RETRY_S)})
        except BaseException:
            self.leave(entry)
            raise

    def leave(self, entry: Entry) -> None:
        """One's turn is over."""
        if name := self._names.pop(entry, ""):
            self._handlers.line.leave(name)
        super().leave(entry)
