"""Requests through /v1 where the trunk's KV memory is short: interactive ones come first, and who leaves gives back her
room at once. The trunk is a server of its own, in this process, so that its room is seen."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator

import httpx
import pytest

from splitlearn.checkpoints.folder import ModelFiles
from splitlearn.scheduling.admission import Admission
from tests.openai_api.test_endpoint import CHAT, chat
from tests.support.openai_server import START_S, serve
from tests.support.tiny import make_converted
from tests.support.trunk import TrunkHere, eventually, serve_here

CONTEXT, BLOCK_TOKENS = 4096, 512
HALF = CONTEXT // 2
FLAGS = "use_cache,inference_mode"
BYTES_A_TOKEN = 2 * 2 * 2 * 12 * 4
"""In the trunk's two layers: keys and values of two heads of 12 numbers."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("tiny") / "long"
    return make_converted(folder, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def trunk(files: ModelFiles) -> Iterator[TrunkHere]:
    """A trunk with room for two answers of half a context, or one of a whole."""
    limits = {"kv_bytes": CONTEXT * BYTES_A_TOKEN, "kv_block_tokens": BLOCK_TOKENS}
    with serve_here(files, f"trunk:{FLAGS}", **limits) as running:
        yield running


@pytest.fixture(scope="module")
def url(files: ModelFiles, trunk: TrunkHere, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    with serve(str(files.folder), folder, flags=FLAGS, trunk={"address": trunk.address}) as address:
        yield address


class Visitor:
    """A client of one streamed answer of nearly half a context. `begun`: she has its first text."""

    def __init__(self, client: httpx.AsyncClient, name: str, priority: str) -> None:
        self.begun = asyncio.Event()
        self._task = asyncio.create_task(self._read(client, name, priority))

    async def _read(self, client: httpx.AsyncClient, name: str, priority: str) -> None:
        request = chat(name, "split", max_tokens=HALF - 200, stream=True)
        async with client.stream("POST", CHAT, json=request, headers={"x-priority": priority}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    self.begun.set()

    async def begins(self) -> None:
        """Wait for the first text."""
        begun = asyncio.create_task(self.begun.wait())
        await asyncio.wait([begun, self._task], timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        assert begun.done()

    async def leave(self) -> None:
        """Close the connection, before the answer has ended."""
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled()


class Room:
    """The trunk's room, and those who visit it through /v1."""

    def __init__(self, client: httpx.AsyncClient, name: str, admission: Admission) -> None:
        self._client, self._name, self._admission = client, name, admission
        self.visitors: list[Visitor] = []

    def queues(self, priority: str) -> Visitor:
        """A visitor who may have to wait."""
        self.visitors.append(Visitor(self._client, self._name, priority))
        return self.visitors[-1]

    async def comes(self, priority: str) -> Visitor:
        """A visitor whose answer begins."""
        visitor = self.queues(priority)
        await visitor.begins()
        return visitor

    async def has(self, sessions: int, waiting: int) -> None:
        """Wait until so many have room and so many wait for it."""
        expected = (sessions, waiting, sessions * HALF // BLOCK_TOKENS)

        def holds() -> bool:
            found = self._admission
            return (found.sessions, found.waiting, found.pool.blocks_used) == expected

        assert await asyncio.to_thread(eventually, holds, START_S), expected


Story = Callable[[Room], Awaitable[None]]


@pytest.fixture
def tell(url: str, files: ModelFiles, trunk: TrunkHere) -> Callable[[Story], None]:
    """Runs a story, at whose end all leave."""

    async def told(story: Story) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=START_S) as client:
            room = Room(client, files.folder.name, trunk.runtime.admission)
            await room.has(0, 0)
            await story(room)
            for visitor in room.visitors:
                await visitor.leave()
            await room.has(0, 0)

    return lambda story: asyncio.run(told(story))


def test_an_interactive_request_gets_the_trunks_room_before_a_batch_one_that_came_earlier(
    tell: Callable[[Story], None],
) -> None:
    async def story(room: Room) -> None:
        first = await room.comes("batch")
        early = room.queues("batch")  # the other half is not for batch requests
        await room.has(sessions=1, waiting=1)
        await room.comes("interactive")
        late = room.queues("interactive")
        await room.has(sessions=2, waiting=2)
        await first.leave()
        await late.begins()
        assert not early.begun.is_set()
        await room.has(sessions=2, waiting=1)
        await late.leave()
        await early.begins()

    tell(story)


def test_a_client_that_leaves_gives_back_the_trunks_room_or_its_place_in_the_queue(
    tell: Callable[[Story], None],
) -> None:
    async def story(room: Room) -> None:
        await room.comes("interactive")  # her answer, as long as that of the one who leaves, goes on to the end
        leaving = await room.comes("interactive")
        waiting, following = room.queues("interactive"), room.queues("interactive")
        await room.has(sessions=2, waiting=2)
        await waiting.leave()
        await room.has(sessions=2, waiting=1)
        assert not following.begun.is_set()
        await leaving.leave()
        await following.begins()
        await room.has(sessions=2, waiting=0)

    tell(story)
