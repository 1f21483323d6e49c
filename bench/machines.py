"""A chain whose client and servers each have a network of their own, with TLS and tokens between all of them: are the
tokens exact, and what happens when two servers lose each other, or a machine dies?

Needs root on Linux: bench/namespaces.py makes the networks.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench.chained import chain_config, parts
from bench.namespaces import Machine, inside, machines
from bench.report import write
from splitlearn.access import tokens
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.config import serving
from splitlearn.errors import SetupError, SplitlearnError
from splitlearn.events import Event, GenerationRequest, TokenEvent
from splitlearn.metrics import RunMetrics
from splitlearn.runtime.progress import silent
from splitlearn.wire import READY

INSIDE = "SPLITLEARN_BENCH_INSIDE"
CLIENT_TOKEN, SERVER_TOKEN = "SPLITLEARN_TRUNK_TOKEN", "SPLITLEARN_FORWARD_TOKEN"
FLAGS = "default"
PORT, TOKENS, ANSWERS, DISTURBED_AT = 50051, 64, 5, 20
REQUEST = GenerationRequest("Explain in two sentences why the sky is blue.", max_new_tokens=TOKENS, ignore_eos=True)


def main(runs: Runs) -> None:
    """Measure and write docs/results/machines.md. Raises SplitlearnError if a token differs."""
    layers = parts(runs.plan, 2)  # finds the model, which cannot be fetched from inside
    if INSIDE not in os.environ:
        if inside([sys.executable, "-m", "bench", "machines"], **{INSIDE: "1"}):
            raise SplitlearnError("The measurement inside the networks has failed.")
        return
    with tempfile.TemporaryDirectory() as folder, machines("first", "second", "spare") as hosts:
        secrets = _secrets(Path(folder))
        # All before the first server starts: it reads then whom it trusts.
        shown = [_certificate(Path(folder), host) for host in hosts]
        os.environ[CLIENT_TOKEN] = secrets["client"]
        with ExitStack() as stack:
            for host, tls, own, nexts in zip(
                hosts, shown, (layers[0], layers[1], layers[1]), (hosts[1:], [], []), strict=True
            ):
                settings = _settings(runs, own, nexts, Path(folder), tls)
                stack.enter_context(_serving(host, settings, Path(folder), secrets["server"]))
            _report(runs, _measured(runs, hosts, layers, Path(folder)))


def _secrets(folder: Path) -> dict[str, str]:
    """Two tokens, their file, and an authority for TLS."""
    made = {name: tokens.make(name) for name in ("client", "server")}
    limits = {"sessions": 64, "tokens_per_second": 1e6}
    entries = [{**entry, **limits} for _, text in made.values() for entry in yaml.safe_load(text)]
    (folder / "tokens.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    return {name: secret for name, (secret, _) in made.items()}


def _certificate(folder: Path, host: Machine) -> dict[str, str]:
    """A certificate of `host` that is its own authority, appended to the file of those that all trust."""
    key, certificate = folder / f"{host.name}.key", folder / f"{host.name}.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    made += ["-subj", f"/CN={host.name}", "-addext", f"subjectAltName=IP:{host.address}"]
    subprocess.run(
        [*made, "-keyout", str(key), "-out", str(certificate)],
        stdin=subprocess.DEVNULL,
        check=True,
        capture_output=True,
    )
    with (folder / "trusted.pem").open("a", encoding="utf-8") as trusted:
        trusted.write(certificate.read_text(encoding="utf-8"))
    return {"certificate": str(certificate), "key": str(key)}


def _settings(
    runs: Runs, layers: tuple[int, int], nexts: list[Machine], folder: Path, tls: dict[str, str]
) -> dict[str, Any]:
    """The settings of a server with the certificate `tls`. It has the flags of the answers, so that a loss does not
    include the start of a server for others."""
    plain = serving(runs.config, runs.flags(FLAGS).trunk).model_dump(mode="json")
    plain["split"] = {"start": layers[0], "end": layers[1]}
    forward_to = {"addresses": [_at(each) for each in nexts], "tls": {"ca": str(folder / "trusted.pem")}}
    server = {"host": "0.0.0.0", "port": PORT, "tokens": str(folder / "tokens.yaml"), "tls": tls}
    plain["server"] = {**plain["server"], **server, "forward_to": forward_to, "drain_s": 0.0, "kv_bytes": 64 << 20}
    return plain


def _at(host: Machine) -> str:
    return f"{host.address}:{PORT}"


@contextmanager
def _serving(host: Machine, settings: dict[str, Any], folder: Path, token: str) -> Iterator[None]:
    path, log = folder / f"{host.name}.yaml", folder / f"{host.name}.log"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with log.open("w", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "server", "--config", str(path)]
        process = host.start(command, errors, **{SERVER_TOKEN: token})
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith(READY):
            raise SetupError(f"The server on {host.name} did not start: {log.read_text(encoding='utf-8')}")
        yield
    finally:
        process.kill()
        process.wait()


def _measured(runs: Runs, hosts: list[Machine], layers: list[tuple[int, int]], folder: Path) -> list[dict[str, Any]]:
    full = _answer(runs, "full").token_ids
    addresses = [[_at(hosts[0])], [_at(host) for host in hosts[1:]]]
    shown = {"tls": {"ca": str(folder / "trusted.pem")}, "token": CLIENT_TOKEN}
    rows = []
    for forward, who in ((False, "the client passes answers on"), (True, "servers forward")):
        settings = chain_config(runs.config, layers, addresses, forward=forward, **shown)
        with Runs(settings, silent) as own:
            _answer(own, "split")
            rows.append(_row(who, [_answer(own, "split") for _ in range(ANSWERS)], full))
        for what, hide in _losses(hosts):
            with Runs(settings, silent) as own:
                _answer(own, "split")
                rows.append(_row(f"{who}; {what}", [_answer(own, "split", partial(hide, True))], full))
                hide(False)
    return rows


def _losses(hosts: list[Machine]) -> list[tuple[str, Callable[[bool], None]]]:
    """What may be lost: in words, and what hides it or shows it again. The spare server is always there."""

    def each_other(hidden: bool) -> None:
        for host in hosts[:2]:
            host.isolate(on=hidden)

    return [
        ("the two servers lose each other", each_other),
        ("the second one's machine is gone", lambda hidden: hosts[1].vanish(on=hidden)),
    ]


def _row(what: str, answers: list[RunMetrics], full: tuple[int, ...]) -> dict[str, Any]:
    wrong = sum(answer.token_ids != full for answer in answers)
    lost = [recovery for answer in answers for _, recovery in answer.recoveries]
    return {
        "what": what,
        "answers": len(answers),
        "with other tokens than full": wrong,
        "losses": len(lost),
        "seconds lost": ", ".join(f"{each.seconds:.1f}" for each in lost),
        "went on at": ", ".join(each.found for each in lost),
    }


def _answer(runs: Runs, kind: Any, disturb: Callable[[], None] | None = None) -> RunMetrics:
    """One answer. `disturb` is called once DISTURBED_AT tokens are there."""
    events: list[Event] = []
    for item in runs.stream(kind, runs.flags(FLAGS), REQUEST):
        if isinstance(item, Event):
            events.append(item)
        count = sum(len(each.token_ids) for each in events if isinstance(each, TokenEvent))
        if disturb is not None and count >= DISTURBED_AT:
            disturb()
            disturb = None
    metrics = RunMetrics.from_events(events)
    if metrics is None:
        raise SplitlearnError("An answer without tokens.")
    return metrics


def _report(runs: Runs, rows: list[dict[str, Any]]) -> None:
    text = (
        "Two servers of half the trunk each, a spare for the second one, and the client: each has a network of its "
        f"own, all speak TLS and show tokens. An answer has {TOKENS} tokens. What is lost is lost after {DISTURBED_AT} "
        "of them, without a word: packets go nowhere, and only pings show it. It comes back after the answer."
    )
    write("machines", "A chain of servers on a network", text, rows, environment(runs))
    wrong = [row["what"] for row in rows if row["with other tokens than full"]]
    if wrong:
        raise SplitlearnError(f"Other tokens than full: {'; '.join(wrong)}.")
