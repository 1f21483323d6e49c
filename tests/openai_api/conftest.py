"""A server that several files ask: its model calls tools."""

from collections.abc import Iterator

import httpx
import pytest

from tests.support.caller import make_caller
from tests.support.openai_server import START_S, serve


@pytest.fixture(scope="package")
def caller_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of `splitlearn serve` with the model `caller` of tests/support/caller.py."""
    folder = tmp_path_factory.mktemp("caller")
    (folder / "serve").mkdir()
    files = make_caller(folder / "caller")
    with (
        serve(str(files.folder), folder / "serve") as address,
        httpx.Client(base_url=address, timeout=START_S) as opened,
    ):
        yield opened
