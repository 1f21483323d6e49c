"""The page: its head, its tabs, and what is shown while the program loads."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from splitlearn.arms.startup import MODEL, TRUNK
from splitlearn.errors import InputError
from splitlearn.flags.selection import parse
from ui import html, inputs
from ui.api.endpoints import Api
from ui.compare import intro, view
from ui.compare.actions import Handlers
from ui.compare.tab import AnswersTab
from ui.flags import flag_words
from ui.flags.picker import Updates
from ui.keyboard import KEYBOARD
from ui.lab.tab import LabTab
from ui.language import choice
from ui.language.blocks import Blocks
from ui.login import Sharing
from ui.model.tab import NAME as MODEL_TAB
from ui.model.tab import ModelTab
from ui.models.panel import ModelsPanel
from ui.trunk.tab import NAME as SERVER_TAB
from ui.trunk.tab import ServerTab
from ui.visitors import visitor

LAB_FLAGS_HELP = "In words, as chosen on the Answers tab until you type others here: each of them is measured."
TICK_S = 0.5
PROMPT: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
POLL_S = 0.1
# Calls that wait for their turn, of all visitors.
MOST_WAITING = 64


def blocks(handlers: Handlers, sharing: Sharing) -> Any:
    """What Gradio launches: the page in each language, and the API. ui/guard chooses which page a visitor gets."""
    with Blocks(title="splitlearn", analytics_enabled=False, fill_width=True) as made:
        Page(made, handlers, sharing)
        made.begin_chinese()
        Page(made, handlers, sharing)
        for listener in made.fns.values():  # what the page calls is the page's alone
            listener.api_visibility = "private"
        made.current_page = ""
        Api(handlers).connect()
    # Calls that go past the queue would run beside each other.
    return made.queue(api_open=False, max_size=MOST_WAITING)


class Page:
    """One page, made inside `blocks`."""

    def __init__(self, blocks: Any, handlers: Handlers, sharing: Sharing) -> None:
        self.blocks = blocks
        self.handlers = handlers
        self.runs = handlers.runs
        self.sharing = sharing
        self._head()
        self._tabs()
        self._connect()

    def _head(self) -> None:
        gr.HTML(choice.links(), elem_id="language")
        gr.Markdown("# splitlearn", elem_classes="sl-title")
        self.facts = gr.HTML(view.facts(self.runs.config, None), elem_id="facts")
        self.intro = gr.HTML(intro.picture(None), elem_id="intro")
        self.link = gr.HTML(html.note(self.sharing.message), elem_id="share-link")
        self.startup = gr.HTML("", elem_id="startup")
        self.timer = gr.Timer(TICK_S)
        self.tick = gr.Timer(2 * TICK_S, active=False)

    def _tabs(self) -> None:
        with gr.Tabs(selected="answers", overflow_behavior="wrap") as self.tabs:
            with gr.Tab("Answers", id="answers"):
                self.answers = AnswersTab(self.handlers)
            with gr.Tab(MODEL_TAB, id="model") as tab:
                self.models = ModelsPanel(self.handlers.chooser)
                self.model = ModelTab(self.handlers.planner, tab)
            with gr.Tab("Lab", id="lab") as tab:
                self.lab_flags = gr.Textbox(
                    self.runs.config.flags, label="Flags", info=LAB_FLAGS_HELP, elem_id="lab-flags", max_lines=1
                )
                self.lab_error = gr.HTML("", elem_id="lab-error")
                self.lab = LabTab(self.handlers.lab, tab, self.runs.config.generation)
            with gr.Tab(SERVER_TAB, id="server"):
                self.server = ServerTab(self.handlers.monitor)

    def _connect(self) -> None:
        self.blocks.load(None, None, None, js=KEYBOARD)
        answers = self.answers
        answers.connect(self.tick)
        answers.history.connect(self.blocks)
        seen = [self.link, self.startup, self.timer]
        read = [self.facts, self.intro, answers.split_facts, answers.fields["form"], answers.error]
        # Each page that is opened while the model is loaded has one of these waiting. One that waits holds no thread.
        self.blocks.load(
            self._open,
            None,
            [*answers.picker.outputs, *seen, *read],
            show_progress="hidden",
            concurrency_limit=None,
        )
        table = answers.flag_table
        self.blocks.load(table.come, None, table.drawn, show_progress="hidden", concurrency_limit=None)
        self.blocks.load(answers.open, None, [answers.status, self.tick], queue=False, show_progress="hidden")
        self.blocks.unload(self._leave)
        # Past the queue, for which a page opens a stream of answers each time.
        self.timer.tick(self._see, None, seen, show_progress="hidden", queue=False)
        # What is being loaded is shown again: a comparison may load more.
        answers.compare.click(lambda: gr.Timer(active=True), None, self.timer, queue=False, show_progress="hidden")
        self.server.connect(self.tabs)
        answers.picker.words.change(
            lambda words: words, answers.picker.words, self.lab_flags, queue=False, show_progress="hidden"
        )
        self.lab.connect(self.lab_flags, answers.fields["prompt"], self.lab_error)
        self.model.connect(answers.picker.words, self._read, [*seen, *read])
        loaded = self.models.connect().then(
            lambda: {**self._read(), **self._flags()}, None, [*answers.picker.outputs, *seen, *read], **PROMPT
        )
        loaded.then(self.model.anew, self.model.given, self.model.all, **PROMPT)

    async def _open(self) -> AsyncIterator[Updates]:
        """A page was opened: what is known of the model once it is read, then the flags that can be applied once the
        trunk has been asked. The words of the flags are there already, and a quick visitor may have typed others."""
        yield self._see()
        while not self.handlers.startup.settled(MODEL):
            await asyncio.sleep(POLL_S)
        yield await asyncio.to_thread(self._read)
        while not self.handlers.startup.settled(MODEL, TRUNK):
            await asyncio.sleep(POLL_S)
        yield await asyncio.to_thread(self._flags)

    def _read(self) -> Updates:
        """What is known of the model."""
        if self.handlers.startup.failure:
            return self._see()
        model, config = self.runs.model, self.runs.config
        return {
            **self._see(),
            self.facts: view.facts(config, model),
            self.intro: intro.picture(model),
            self.answers.split_facts: view.split_facts(config, model),
            self.answers.fields["form"]: gr.Radio(inputs.forms(model.capabilities.chat_templates)),
        }

    def _flags(self) -> Updates:
        """The flags as they are available now, as the configuration has them."""
        if self.handlers.startup.failure:
            return self._see()
        known, said, picker = flag_words.available(self.runs), {}, self.answers.picker
        try:
            flags = parse(self.runs.config.flags, known)
        except InputError as error:  # a flag that config.yaml names and that cannot be applied here now
            flags, said = parse("auto", known), {picker.words: "auto", self.answers.error: html.error(str(error))}
        return {**picker.show(flags, known, self.runs.config.flags), **self._see(), **said}

    def _leave(self, request: gr.Request) -> None:
        self.handlers.leave(visitor(request))
        self.lab.watches.leave(visitor(request))
        self.answers.flag_table.watches.leave(visitor(request))

    def _see(self) -> Updates:
        """What goes on in the background."""
        startup = self.handlers.startup
        running = startup.running
        return {
            self.link: html.note(self.sharing.message),
            self.startup: view.startup(startup.parts(), running),
            self.timer: gr.Timer(active=running or self.sharing.state == "asked"),
        }
