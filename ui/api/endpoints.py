"""The public API: one function for each action of the page. Each returns the object that the command line prints.

Each function is an endpoint of Gradio's API and, with `ui.mcp`, an MCP tool. Both show its docstring (docs/api.md). A
function that runs a model is a generator: it yields objects with `progress`, a sentence on what happens now, and last
its answer. It queues with the page's own runs, takes the same values and fails with the same errors.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import gradio as gr

from splitlearn.arms.compare import Comparison, divergent_logits, environment
from splitlearn.arms.link_cost import link_cost
from splitlearn.checkpoints import catalogue
from splitlearn.errors import SplitlearnError
from splitlearn.flags.selection import parse
from splitlearn.lab.analysis.flags_table import flags_table
from splitlearn.lab.job import JobStatus
from splitlearn.link.emulated import NONE
from splitlearn.planning.anatomy import parts_of
from ui import inputs
from ui.api import arguments
from ui.api.turns import ENDED, Turns
from ui.compare import view
from ui.compare.actions import Handlers
from ui.compare.session import ComparisonView
from ui.flags import flag_words
from ui.model.actions import USUAL_CONTEXT
from ui.model.view import context_of

Answer = dict[str, Any]


class Api:
    """The endpoints. `connect`, called inside the page's Blocks, registers them."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.runs = handlers.runs
        self.turns = Turns(handlers)

    def connect(self) -> None:
        """Register the endpoints. Those that run a model share one turn with the page's own runs."""
        for endpoint in (self.compare, self.plan_cut):
            gr.api(endpoint, concurrency_id="runs", concurrency_limit=1)
        # Not in that queue: while an experiment runs, another call must be refused at once, not wait. The limit of 2
        # lets the second call in for that.
        gr.api(self.compare_flags, concurrency_limit=2)
        gr.api(self.models)

    def compare(
        self,
        request: gr.Request,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        flags: str | None = None,
        pairs: int = 1,
        link: str | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        samples: int = 1,
        stop: list[str] | None = None,
        chat: bool | str | None = None,
        ignore_eos: bool = False,
    ) -> Iterator[Answer | str]:
        """Run one prompt through the full and the split model: the object of `splitlearn compare --json`.

        Args:
            prompt: Text. Default: generation.prompt of config.yaml.
            max_new_tokens: Tokens of the answer at most, 1 or more. Default: generation.max_new_tokens.
            flags: Flags in the words of --flags, such as "default" or "use_cache,inference_mode". Default: flags.
            pairs: How often each arm runs, 1 to 100; the ratio has the spread of its pairs.
            link: Emulated link: none, lan, wifi, 4g, 5g, transatlantic, satellite or "rtt=50ms,up=10mbit".
            temperature: 0 takes the likeliest token, above 0 draws.
            top_k: Draw from the k likeliest tokens; 0 is off.
            top_p: Draw from the likeliest tokens with this share, above 0 to 1; 1 is off.
            repetition_penalty: Above 0; 1 is off.
            seed: Seed of the drawing, 0 or more.
            samples: Answers at once, with this seed and the next ones, 1 or more.
            stop: Texts at which the answer ends.
            chat: Whether to apply the model's chat template, or its name. Default: generation.chat.
            ignore_eos: Go on to the token limit, for measuring.
        """
        settings = self.runs.config.generation
        with self.turns.turn(request) as who:
            typed = {
                "prompt": arguments.text("prompt", settings.prompt if prompt is None else prompt),
                "max_new_tokens": settings.max_new_tokens if max_new_tokens is None else max_new_tokens,
                "form": inputs.form(arguments.form("chat", settings.chat if chat is None else chat)),
                "stop": arguments.texts("stop", stop or []),
                "ignore_eos": arguments.truth("ignore_eos", ignore_eos),
                **{"temperature": temperature, "top_k": top_k, "top_p": top_p},
                **{"repetition_penalty": repetition_penalty, "seed": seed, "samples": samples},
                **{"pairs": pairs, "link": self._link(link)},
            }
            words, shown = self._flags(flags), ComparisonView()
            with closing(self.handlers.compare(typed, words, who)) as states:  # type: ignore[type-var]  # a generator
                for shown in states:
                    yield _compared(shown)
            yield {"progress": "Reading what the machine and the link are."}
            yield _answer(self._comparison(shown, typed, words, who), request)

    def compare_flags(
        self,
        request: gr.Request,
        flags: str | None = None,
        design: str = "without",
        pairs: int = 2,
        max_new_tokens: int | None = None,
        prompts: str | None = None,
        delta: float = 0.02,
        seed: int = 0,
    ) -> Iterator[Answer | str]:
        """Measure what each flag does, in full and in split, with the lab's experiment: the flags table as an object.

        Takes minutes. Meanwhile nothing else is compared. The experiment stays in the list of the Lab tab.

        Args:
            flags: Flags in the words of --flags. Default: flags of config.yaml.
            design: without (all flags but one), alone (each flag alone) or ladder (one after another).
            pairs: Passes over all arms that count, 2 to 10000, after a first one.
            max_new_tokens: Tokens of each run, 2 or more. Default: generation.max_new_tokens.
            prompts: Text, a prompt on each line. Default: generation.prompt.
            delta: A ratio this near to 1 is no effect, 0.001 to 0.5.
            seed: Seed of the order of the runs, 0 or more.
        """
        settings = self.runs.config.generation
        with self.turns.call(request) as who:
            typed = {
                "design": arguments.text("design", design),
                "limit": "pairs",
                "pairs": pairs,
                "delta": delta,
                "prompts": arguments.text("prompts", prompts or ""),
                "tokens": settings.max_new_tokens if max_new_tokens is None else max_new_tokens,
                "order_seed": seed,
            }
            words, status = self._flags(flags), None
            for reason in self.turns.quiet(who):
                yield {"progress": reason}
            self.handlers.lab.start(typed, words, settings.prompt)
            for status in self.turns.experiment(who):
                yield {"progress": _measured(status)}
            yield _answer(_table(status), request)

    def plan_cut(
        self,
        request: gr.Request,
        start: int | None = None,
        end: int | None = None,
        context: int | None = None,
        client_memory_mb: float | None = None,
        link: str | None = None,
        flags: str | None = None,
        measure: bool = False,
    ) -> Iterator[Answer | str]:
        """Measure what each cut of the model costs here: the object of `splitlearn parts --cuts --json`.

        Args:
            start: First layer of the trunk, 0 or more. Default: the cut of config.yaml.
            end: Layer after the trunk's last, above start. Default: the cut of config.yaml.
            context: Tokens of KV cache, 1 to what the model takes. Default: 2048, or all that it takes.
            client_memory_mb: Most megabytes at the client, above 0. Default: no limit.
            link: Emulated link: none, lan, wifi, 4g, 5g, transatlantic, satellite or "rtt=50ms,up=10mbit".
            flags: Flags in the words of --flags. Default: flags of config.yaml.
            measure: Run the cut from start to end, too, beside the prediction.
        """
        with self.turns.turn(request) as who:
            planner, plan = self.handlers.planner, self.runs.plan
            anatomy = planner.anatomy()
            usual = min(USUAL_CONTEXT, context_of(anatomy))
            typed = {
                "start": plan.start if start is None else start,
                "end": plan.end if end is None else end,
                "context": usual if context is None else context,
                "memory": client_memory_mb,
                "link": self._link(link),
            }
            question, words, run = planner.question(typed), self._flags(flags), arguments.truth("measure", measure)
            for step in planner.measure(words, who):
                yield {"progress": step.label}
            for step in planner.measure_cut(question, words, who) if run else ():
                yield {"progress": step.label}
            self.turns.check(who)
            report = planner.report(question)
            if report is None:  # nothing was measured
                raise SplitlearnError(ENDED)
            parts = [asdict(part) for part in parts_of(anatomy, question.plan, report.context)]
            model, cuts = asdict(anatomy), report.as_json()
            yield _answer({"anatomy": model, "context": report.context, "parts": parts, "cuts": cuts}, request)

    def models(self, request: gr.Request) -> Answer | str:
        """List the models of the catalogue and of the cache: the object of `splitlearn models --json`."""
        return _answer(catalogue.as_json(self.runs.config.model), request)

    def _flags(self, words: object) -> str:
        return arguments.text("flags", self.runs.config.flags if words is None else words)

    def _link(self, words: object) -> str:
        return arguments.text("link", (self.runs.config.trunk.link or NONE) if words is None else words)

    def _comparison(self, shown: ComparisonView, typed: Answer, words: str, who: str) -> Answer:
        """The comparison as the command line prints it."""
        pairs = shown.pairs
        if pairs is None or len(pairs.full) < shown.n_pairs:
            raise SplitlearnError(_failure(shown) or ENDED)
        runs, flags = self.runs, parse(words, flag_words.available(self.runs))
        stop, generation = self.handlers.stops.signal(who), inputs.request(typed)
        logits = divergent_logits(runs, generation, flags, pairs, stop)
        why = runs.model.why
        found = Comparison(runs.files.name, runs.plan, flags, pairs, shown.others_cpu, environment(runs), logits, why)
        cost = link_cost(runs, generation, flags, found.split, cancelled=stop)
        return {**found.as_json(), "link": cost and cost.as_json()}


def _answer(found: Answer, request: gr.Request) -> Answer | str:
    """The answer for the caller. For MCP it is JSON text, since Gradio would send the repr of a dict."""
    return json.dumps(found) if request.headers.get("x-gradio-user") == "mcp" else found


def _compared(shown: ComparisonView) -> Answer:
    """Progress of a comparison: status, and tokens so far of each arm."""
    tokens = {arm.kind: arm.metrics.n_tokens if arm.metrics else 0 for arm in (shown.full, shown.split)}
    return {"progress": view.status(shown), "tokens": tokens}


def _failure(shown: ComparisonView) -> str:
    """The errors, those of an arm after its name; empty if there are none."""
    errors = [f"{view.TITLES[arm.kind][0]}: {arm.error}" for arm in (shown.full, shown.split) if arm.error]
    return " ".join(filter(None, (shown.error, *errors)))


def _measured(status: JobStatus) -> str:
    """Progress of an experiment."""
    if status.progress is None:
        return "Measuring: getting ready."
    now = status.progress
    return f"Measuring: {now.phase}; {now.blocks} pairs, {now.runs} runs so far."


def _table(status: JobStatus | None) -> Answer:
    if status is None or status.findings is None:
        raise SplitlearnError((status and status.error) or ENDED)
    if status.error:
        raise SplitlearnError(status.error)
    return flags_table(status.findings).as_json()
