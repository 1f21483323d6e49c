"""A load test of any server of the OpenAI protocol."""

from dataclasses import asdict

from splitlearn.cli.loadtest_run import Stopping
from splitlearn.loadtest.clients import warmed
from splitlearn.loadtest.driver import Measurement, drive
from splitlearn.loadtest.endpoint import Endpoint
from splitlearn.loadtest.plan import LoadTest
from splitlearn.loadtest.report import LoadTestResult
from splitlearn.loadtest.summary import Summary
from splitlearn.loadtest.url_clients import UrlClient, connected
from splitlearn.runtime import hardware, programs
from splitlearn.runtime.progress import Progress, Step
from splitlearn.runtime.terminal import say


def load_endpoint(endpoint: Endpoint, asked: LoadTest, progress: Progress, stopping: Stopping) -> LoadTestResult:
    """Load the server. Raises EndpointError if it does not answer a first request."""
    if endpoint.key_in_the_clear:
        say(f"warning: the API key goes to {endpoint.url} without TLS.", stderr=True)
    progress(Step(f"Asking {endpoint.url}"))
    with connected(endpoint, asked) as connection:
        used, made = connection.endpoint, [UrlClient(connection, asked) for _ in range(asked.clients)]
        with warmed(made, progress) as clients, stopping as stop:
            measured = drive(clients, asked, progress, stop)
    path = "chat" if used.chat else "completions"
    return LoadTestResult(
        load=asked,
        clients=f"{path} at {used.url}",
        prompt_tokens=_prompt_tokens(measured),
        measurement=measured,
        summary=Summary.of(measured, asked.levels),
        model=used.model,
        command=programs.this_command(),
        environment={"client": hardware.describe(), "url": used.url, "path": path, "form": asdict(used.form)},
    )


def _prompt_tokens(measured: Measurement) -> tuple[int, ...]:
    """The lengths of the prompts by the server's count."""
    return tuple(sorted({outcome.end.prompt_tokens for outcome in measured.outcomes if outcome.end is not None}))
