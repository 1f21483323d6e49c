"""Puts the environment's HTTP proxies in order: none for this machine, and none that cannot be used.

Companies set HTTP_PROXY, HTTPS_PROXY and ALL_PROXY for all programs. Call `settle` before an HTTP library reads them;
it acts on this process and its children. gRPC uses no proxy at all (wire/channel.py).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HERE = ("localhost", "127.0.0.1", "::1")
_PROXIES, _NO_PROXY = ("http_proxy", "https_proxy", "all_proxy"), "no_proxy"


def settle(*hosts: str) -> None:
    """Add HERE and `hosts` to the proxies' exceptions. The user's own exceptions stay.

    Gradio and the model hub's client use httpx. httpx raises for a proxy of an unknown kind (socks without `socksio`)
    and for some exceptions (`[::1]`, `fd00::/8`), whatever the request: Gradio can then not be imported. `settle`
    removes such a value, with a line that names its variable.
    """
    for name in _variables(*_PROXIES):
        why = _refusal(ALL_PROXY=os.environ[name])
        if why is not None:
            _leave_out(name, "httpx[socks] is not installed" if isinstance(why, ImportError) else "it is no http URL")
            del os.environ[name]
    exceptions = _variables(_NO_PROXY)
    if not exceptions and _variables(*_PROXIES):
        exceptions = [_NO_PROXY]  # in this case, every program reads it
    for name in exceptions:
        os.environ[name] = _extended(name, os.environ.get(name, ""), (*HERE, *hosts))


def _variables(*names: str) -> list[str]:
    """Those of `names` that are set, in upper or lower case."""
    return [name for name in os.environ if name.lower() in names]


def _extended(name: str, value: str, hosts: tuple[str, ...]) -> str:
    """The exceptions in `value`, and `hosts`. `*` excepts everything, but only alone."""
    if value.strip() == "*":
        return value
    kept = []
    for each in filter(None, (text.strip() for text in value.split(","))):
        if _refusal(NO_PROXY=each) is None:
            kept.append(each)
        elif each.strip("[]") not in hosts:
            _leave_out(f"{each!r} in {name}", "httpx cannot read it")
    return ",".join(dict.fromkeys((*kept, *hosts)))


def _refusal(**variables: str) -> Exception | None:
    """The exception that httpx raises if these are the only proxy variables."""
    import httpx  # slow to import: only where there are such variables

    others = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with _environment({**others, **variables}):
        try:
            httpx.Client(verify=False).close()
        except Exception as error:  # errors of several kinds, from several libraries
            return error
    return None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Nothing but `variables` inside. (unittest.mock has this, and imports asyncio.)"""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _leave_out(what: str, why: str) -> None:
    """Print a warning, without the value of a proxy: it may hold a password."""
    print(f"warning: {what} is not used: {why}.", file=sys.stderr)
