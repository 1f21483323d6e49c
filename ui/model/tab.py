"""The tab "Model and cut": the model's parts, the cost of each cut, and the choice of the cut in use."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import gradio as gr

from splitlearn.errors import InputError, SplitlearnError
from splitlearn.link.emulated import NONE
from splitlearn.link.words import PRESETS
from splitlearn.models.plan import SplitPlan
from splitlearn.planning.anatomy import Anatomy
from splitlearn.runtime.progress import Step
from ui import html
from ui.flags.picker import Updates
from ui.guard.owner import check_owner
from ui.model import cuts, view
from ui.model.actions import USUAL_CONTEXT, Planner, Question
from ui.model.pareto import PRESS, pareto
from ui.model.picture import DRAG, PICKED, picture
from ui.models.notice import key
from ui.visitors import visitor

NAME = "Model and cut"
LABELS = {"start": "Trunk begins at layer", "end": "Trunk ends before layer", "context": "Context, tokens"}
LABELS |= {"memory": "Client memory limit, MB", "link": "Link"}
WHAT = (
    "The client keeps the embeddings, the layers outside the cuts, the final norm and the LM head. The trunk server "
    "has the layers between the cuts and their KV cache. Drag a cut, or use the fields."
)
ALL = (
    "Lower is faster, further left is a smaller client. Press a point to choose its cut; the arrow keys go from point "
    "to point."
)
GIVE_WAY = """(moved, other) => {
  if (moved === null) return other;
  const last = +(document.querySelector('[data-layers]')?.dataset.layers ?? Infinity);
  const {dataset} = document.getElementById('%s');
  if (+dataset.given !== other) dataset.own = other;
  const own = +dataset.own;
  return dataset.given = %s;
}"""
"""The end with this id gives way when the other one meets it, and goes back to its own place when it can: who types 25
is at 2 first."""
SPEAKS = "element.setAttribute('role', 'status')"


class ModelTab:
    """The tab's components, built inside `tab`. `connect` adds their event handlers."""

    def __init__(self, planner: Planner, tab: Any) -> None:
        self.planner, self.tab = planner, tab
        self.fields: dict[str, Any] = {}
        gr.HTML(f'<h2>The model</h2><p class="sl-small">{WHAT}</p>', elem_classes="sl-report")
        self.picture = gr.HTML("", js_on_load=DRAG, elem_id="model-picture")
        self._range()
        self.error = gr.HTML("", elem_id="model-error")
        # The key of the model and cut in use that the tab was last set to.
        self.shown = gr.Textbox("", visible="hidden")
        self.facts = gr.HTML("", elem_id="model-facts")
        self.parts = gr.HTML("", elem_id="model-parts")
        gr.HTML("<h2>Where to cut</h2>", elem_classes="sl-report")
        self._client()
        self._buttons()
        self.advice = gr.HTML(cuts.empty(), elem_id="model-advice")
        self._cuts()

    def _range(self) -> None:
        infos = {
            "start": "The client has the layers before it.",
            "end": "The client has this layer and the following ones.",
        }
        with gr.Row():
            for name, info in infos.items():
                # Without bounds: Gradio would refuse what is outside before a handler could name the field.
                self.fields[name] = gr.Number(label=LABELS[name], info=info, min_width=240, elem_id=f"model-{name}")

    def _client(self) -> None:
        infos = {
            "context": "Prompt and answer: what the KV caches hold.",
            "memory": "Memory of the client process, libraries included. Empty: no limit.",
        }
        with gr.Row():
            for name, info in infos.items():
                self.fields[name] = gr.Textbox(
                    "", label=LABELS[name], info=info, min_width=240, elem_id=f"model-{name}"
                )
            self.fields["link"] = gr.Dropdown(
                [(preset.label, name) for name, preset in PRESETS.items()],
                value=self.planner.runs.config.trunk.link or NONE,
                allow_custom_value=True,
                label=LABELS["link"],
                info="Used for predictions. Choose one, or type words such as rtt=50ms,up=10mbit.",
                min_width=240,
                elem_id="model-link",
            )

    def _buttons(self) -> None:
        later = {"interactive": False}  # until the model is read: the fields are empty before
        with gr.Row():
            self.measure = gr.Button(
                "Measure this machine", variant="primary", min_width=180, elem_id="model-measure", **later
            )
            self.measure_cut = gr.Button("Measure this cut", min_width=160, elem_id="model-measure-cut", **later)
            self.adopt = gr.Button("Adopt this cut", min_width=160, elem_id="model-adopt", **later)
            self.stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="model-stop")
        self.status = gr.HTML("", js_on_load=SPEAKS, elem_id="model-status")

    def _cuts(self) -> None:
        with gr.Column(visible=False) as self.known:
            self.chosen = gr.HTML("", elem_id="model-chosen")
            gr.HTML(f'<h3>All cuts</h3><p class="sl-small">{ALL}</p>', elem_classes="sl-report")
            self.pareto = gr.HTML("", js_on_load=PRESS, elem_id="model-pareto")
            self.front = gr.HTML("", elem_id="model-front")
        self.yaml = gr.Textbox(
            "",
            label="The chosen cut for config.yaml",
            info="Adopt lasts until the program ends. These lines are for every start, and for a trunk server.",
            lines=3,
            interactive=False,
            buttons=["copy"],
            elem_id="model-yaml",
        )

    def connect(self, words: Any, look: Callable[[], Updates], looked: list[Any]) -> None:
        """Add the event handlers. `words` are the chosen flags. `look` updates `looked`: what the rest of the page
        shows of the split."""
        self.words = words
        self.given = {*self.fields.values(), words, self.shown}
        start, end = self.fields["start"], self.fields["end"]
        given, drawn = self.given, [*self._drawings, self.error]
        self.tab.select(self._come, given, self.all, concurrency_limit=None, trigger_mode="always_last")
        # The fields are set in the browser: of two answers, the first could come last.
        start.input(None, [start, end], end, js=GIVE_WAY % (end.elem_id, "Math.min(last, Math.max(own, moved + 1))"))
        end.input(None, [end, start], start, js=GIVE_WAY % (start.elem_id, "Math.max(0, Math.min(own, moved - 1))"))
        for shown in (self.picture, self.pareto):
            shown.cut(None, None, [start, end], js=PICKED % shown.elem_id, trigger_mode="multiple")
        typed = [each for name in ("context", "memory") for each in _ways(self.fields[name])]
        typed += [self.fields["link"].input]
        # One event draws: of two, the last that was answered would be shown, not the last that was asked for.
        gr.on([start.change, end.change, *typed], self._draw, given, drawn, trigger_mode="always_last")
        self._run(self.measure, self._measure, given)
        self._run(self.measure_cut, self._measure_cut, given)
        self._run(self.adopt, self._adopt, given).then(look, None, looked)
        self.stop.click(self._stop, None, self.stop, queue=False)

    @property
    def all(self) -> list[Any]:
        """The components that change with the model."""
        ends = [self.fields[name] for name in ("start", "end", "context")]
        return [*self._drawings, self.error, self.status, self.shown, *ends, *self._actions]

    @property
    def _drawings(self) -> list[Any]:
        cut = [self.picture, self.facts, self.parts, self.yaml]
        return [*cut, self.advice, self.known, self.chosen, self.pareto, self.front]

    @property
    def _actions(self) -> list[Any]:
        return [self.measure, self.measure_cut, self.adopt, self.stop]

    def _run(self, button: Any, run: Callable[..., Any], given: set[Any]) -> Any:
        """Show at once that it begins, run in the queue of all runs, then draw and reset the buttons in any case."""
        begun = button.click(self._begin, None, [*self._actions, self.status, self.error], queue=False)
        shown = [self.status, self.error, self.shown]
        ran = begun.then(run, given, shown, concurrency_id="runs", concurrency_limit=1)
        return ran.then(self._end, given, [*self._actions, *self._drawings], queue=False)

    def _enabled(self, running: bool) -> Updates:
        return {each: gr.Button(interactive=running == (each is self.stop)) for each in self._actions}

    def _begin(self, request: gr.Request) -> Updates:
        place = self.planner.begin(visitor(request))
        return {**self._enabled(running=True), self.status: cuts.turn(place), self.error: ""}

    def _end(self, given: dict[Any, Any], request: gr.Request) -> Updates:
        """Draw what was measured for the fields as they are now. An error of the run stays."""
        self.planner.line.leave(visitor(request))
        drawn = {part: update for part, update in self._draw(given).items() if part is not self.error}
        return {**drawn, **self._enabled(running=False)}

    def _stop(self, request: gr.Request) -> Any:
        self.planner.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    async def _come(self, given: dict[Any, Any]) -> AsyncIterator[Updates]:
        """On opening the tab: read the model, and show the chosen cut, at first the one in use."""
        if not self.planner.is_read:
            yield {self.facts: cuts.note("Reading the model's structure: a few seconds, once.")}
        try:
            anatomy = await asyncio.to_thread(self.planner.anatomy)
        except SplitlearnError as error:
            yield {self.facts: "", self.error: html.error(str(error))}
            return
        yield await asyncio.to_thread(self._first, anatomy, given)

    async def anew(self, given: dict[Any, Any]) -> AsyncIterator[Updates]:
        """Show another model and its cut, without what was measured of the last one. Once: the visitor who chose it may
        have typed since, and her page notices it as those of others do."""
        if given[self.shown] == key(self.planner.runs):
            yield {self.shown: gr.skip()}
            return
        gone: Updates = {self.advice: cuts.empty(), self.known: gr.Column(visible=False)}
        yield gone | {self.chosen: "", self.pareto: "", self.front: "", self.status: ""}
        async for updates in self._come({**given, self.fields["context"]: ""}):
            yield updates

    def _first(self, anatomy: Anatomy, given: Mapping[Any, Any]) -> Updates:
        plan = self.planner.runs.plan
        start, end, context = (self.fields[name] for name in ("start", "end", "context"))
        fresh = not given[context]
        values = dict(given)
        if fresh:
            usual = str(min(USUAL_CONTEXT, view.context_of(anatomy)))
            values |= {start: plan.start, end: plan.end, context: usual}
        return {
            **self._draw(values),
            self.facts: view.facts(anatomy),
            **{field: values[field] for field in (start, end, context)},
            **(self._enabled(running=False) if fresh else {}),
        }

    def _meet(self, given: Mapping[Any, Any]) -> bool:
        """Whether one end was moved to the other one or beyond, and the other has not given way yet."""
        start, end = given[self.fields["start"]], given[self.fields["end"]]
        numbers = isinstance(start, int) and isinstance(end, int)
        return numbers and 1 <= end <= start < self.planner.anatomy().n_layers

    def _question(self, given: Mapping[Any, Any]) -> Question:
        typed = {name: "" if given[field] is None else given[field] for name, field in self.fields.items()}
        try:
            return self.planner.question(typed)
        except InputError as error:  # by the field's label
            field = LABELS.get(error.field.removeprefix("split."), error.field)
            raise InputError(field, error.value, error.expected) from error

    def _draw(self, given: Mapping[Any, Any]) -> Updates:
        """Draw the picture and the figures for the fields; nothing while one end gives way to the other."""
        try:
            if self._meet(given):
                return {self.error: gr.skip()}
            question = self._question(given)
            report = self.planner.report(question)
        except SplitlearnError as error:
            return {self.error: html.error(str(error))}
        anatomy, plan, measured = self.planner.anatomy(), question.plan, self.planner.measured
        size = float(anatomy.hidden_size * anatomy.bytes_per_value)
        up, down = (report.rates.bytes_up, report.rates.bytes_down) if report else (size, size)
        shown: Updates = {
            self.error: "",
            self.picture: picture(anatomy, plan, up, down),
            self.parts: view.parts(anatomy, plan),
            self.yaml: f"split:\n  start: {plan.start}\n  end: {plan.end}",
        }
        if report is None or measured is None:
            return shown
        other = given[self.words] != measured.words
        return {
            **shown,
            self.advice: cuts.advice(report, measured.words, measured.at_s, other),
            self.known: gr.Column(visible=True),
            self.chosen: cuts.chosen(report, plan, self.planner.short(question, measured.rates)),
            self.pareto: pareto(report, plan),
            self.front: cuts.front(report),
        }

    def _measure(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        yield from self._follow(lambda: self.planner.measure(given[self.words] or "", visitor(request)))

    def _measure_cut(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        yield from self._follow(
            lambda: self.planner.measure_cut(self._question(given), given[self.words] or "", visitor(request))
        )

    def _follow(self, begin: Callable[[], Iterator[Step]]) -> Iterator[Updates]:
        try:
            for step in begin():
                yield {self.status: cuts.progress(step)}
        except SplitlearnError as error:
            yield {self.status: "", self.error: html.error(str(error))}
            return
        yield {self.status: ""}

    def _adopt(self, given: dict[Any, Any], request: gr.Request) -> Updates:
        try:
            check_owner(request)
            plan = self._question(given).plan
            self.planner.adopt(plan)
        except SplitlearnError as error:
            return {self.status: "", self.error: html.error(str(error))}
        return {self.status: cuts.note(_adopted(plan)), self.shown: key(self.planner.runs)}


def _adopted(plan: SplitPlan) -> str:
    return (
        f"From now on the trunk has layers [{plan.start}, {plan.end}), for every visitor of this page until the "
        "program ends. The next comparison loads both arms first."
    )


def _ways(field: Any) -> list[Any]:
    """The events that submit a typed value."""
    return [field.submit, field.blur]
