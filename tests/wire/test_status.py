"""Errors over the wire: for every class and any text, what a client raises for what a server refused with."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitlearn import errors
from splitlearn.errors import InputError, SplitlearnError, TrunkError, TrunkFailed, TrunkFull, TrunkRefused
from splitlearn.wire.status import error_of, shorten, status_of

ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _all(kind: type[SplitlearnError]) -> Iterator[type[SplitlearnError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _all(each)


KINDS = sorted({*_all(SplitlearnError), RuntimeError}, key=lambda kind: kind.__name__)


class Refusing:
    """A real server that refuses each call with `error`."""

    def __init__(self) -> None:
        self.error: Exception = RuntimeError()
        self._server = grpc.server(ThreadPoolExecutor(1), handlers=[_Handler(self)])
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}")
        self._server.start()

    def arrives(self, error: Exception) -> TrunkError:
        """What a client raises for `error`."""
        self.error = error
        method: Any = self._channel.unary_unary("/any/method")
        with pytest.raises(grpc.RpcError) as caught:
            method(b"", timeout=60)
        return error_of(caught.value, "host:1")

    def close(self) -> None:
        self._channel.close()
        self._server.stop(0).wait()


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, refusing: Refusing) -> None:
        self._refusing = refusing

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.abort_with_status(status_of(self._refusing.error))
        )


@pytest.fixture(scope="module")
def server() -> Iterator[Refusing]:
    made = Refusing()
    yield made
    made.close()


TEXTS = st.one_of(
    st.text(), st.tuples(st.sampled_from("a%\n\0é日😀"), st.integers(1, 9000)).map(lambda at: at[0] * at[1])
)


def _made(kind: type[Exception], text: str) -> Exception:
    return kind(text, text, text) if kind is InputError else kind(text)


@ANY_SPEED
@given(kind=st.sampled_from(KINDS), text=TEXTS)
def test_every_error_arrives_as_its_kind_with_its_text(server: Refusing, kind: type[Exception], text: str) -> None:
    error = _made(kind, text)
    found = server.arrives(error)
    if isinstance(error, TrunkError) and kind is not TrunkError:
        assert type(found) in kind.__mro__[: kind.__mro__.index(TrunkError)]
    else:
        assert type(found) is (TrunkRefused if kind is InputError else TrunkFailed)
    assert (shorten(str(error)) or "no details") in str(found)


@ANY_SPEED
@given(retry_s=st.floats(0, 1e6))
def test_a_full_trunk_says_when_to_try_again(server: Refusing, retry_s: float) -> None:
    found = server.arrives(TrunkFull("no room", retry_s))
    assert isinstance(found, TrunkFull) and found.retry_s == pytest.approx(retry_s, abs=1e-6)


def test_the_kinds_are_all_that_the_program_raises() -> None:
    named = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SplitlearnError)}
    assert named <= set(KINDS)
