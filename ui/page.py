"""The page: its head, its tabs, and its status while the program loads."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import gradio as gr

from splitlearn.arms.startup import MODEL, TRUNK
from splitlearn.errors import InputError
from splitlearn.flags.selection import parse
from ui import html, inputs
from ui.api.endpoints import Api
from ui.attacks.tab import NAME as ATTACKS_TAB
from ui.attacks.tab import AttacksTab
from ui.chat.tab import NAME as CHAT_TAB
from ui.chat.tab import ChatTab, storage
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
from ui.models.notice import ModelNotice
from ui.models.panel import ModelsPanel
from ui.trunk.tab import NAME as SERVER_TAB
from ui.trunk.tab import ServerTab
from ui.visitors import visitor

LAB_FLAGS_HELP = "The flags to measure. They follow the Answers tab until you type others."
TICK_S = 0.5
POLL_S = 0.1
# Calls that wait for their turn, of all visitors.
MOST_WAITING = 64


def blocks(handlers: Handlers, sharing: Sharing) -> Any:
    """The Blocks that Gradio launches: the page in each language, and the API. ui/guard chooses a visitor's page."""
    with Blocks(title="splitlearn", analytics_enabled=False, fill_width=True) as made:
        Page(made, handlers, sharing)
        made.begin_chinese()
        Page(made, handlers, sharing)
        for listener in made.fns.values():
            listener.api_visibility = "private"  # no endpoint of the public API
            # The page itself says how far things are. Gradio would copy all parts that it ever marked at each message.
            listener.show_progress, listener.show_progress_on = "hidden", []
        made.current_page = ""
        Api(handlers).connect()
    # Not api_open: calls past the queue would run concurrently.
    return made.queue(api_open=False, max_size=MOST_WAITING)


class Page:
    """The page in one language, built inside `blocks`."""

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
        self.intro = gr.HTML(intro.picture(None), js_on_load=intro.TO_TAB, elem_id="intro")
        self.link = gr.HTML(html.note(self.sharing.message), elem_id="share-link")
        self.startup = gr.HTML("", elem_id="startup")
        self.notice = ModelNotice(self.handlers.startup)
        self.timer = gr.Timer(TICK_S)
        self.tick = gr.Timer(2 * TICK_S, active=False)

    def _tabs(self) -> None:
        talk = storage()
        with gr.Tabs(selected="answers", overflow_behavior="wrap") as self.tabs:
            with gr.Tab("Answers", id="answers"):
                self.answers = AnswersTab(self.handlers)
            with gr.Tab(CHAT_TAB, id="chat") as tab:
                self.chat = ChatTab(self.handlers, self.answers, tab, talk)
            with gr.Tab(MODEL_TAB, id="model") as tab:
                self.models = ModelsPanel(self.handlers.chooser)
                self.model = ModelTab(self.handlers.planner, tab)
            with gr.Tab("Lab", id="lab") as tab:
                self.lab_flags = gr.Textbox(
                    self.runs.config.flags, label="Flags", info=LAB_FLAGS_HELP, elem_id="lab-flags", max_lines=1
                )
                self.lab_error = gr.HTML("", elem_id="lab-error")
                self.lab = LabTab(self.handlers.lab, tab, self.runs.config.generation)
            with gr.Tab(ATTACKS_TAB, id="attacks", elem_id="tab-attacks") as tab:
                self.attacks = AttacksTab(self.handlers.attacks, self.handlers.downloads, tab)
            with gr.Tab(SERVER_TAB, id="server"):
                self.server = ServerTab(self.handlers.monitor)

    def _connect(self) -> None:
        for script in (KEYBOARD, choice.KEEP_QUERY):
            self.blocks.load(None, None, None, js=script)
        answers = self.answers
        answers.connect(self.tick)
        self.chat.connect(self.blocks)
        answers.history.connect(self.blocks)
        seen = [self.link, self.startup, self.timer]
        read = [self.facts, self.intro, self.notice.shown]
        read += [answers.split_facts, answers.fields["form"], answers.error]
        # Each page opened while the model loads waits in one of these. They are async, so waiting holds no thread.
        self.blocks.load(
            self._open,
            None,
            [*answers.picker.outputs, *seen, *read],
            concurrency_limit=None,
        )
        table = answers.flag_table
        self.blocks.load(table.come, None, table.drawn, concurrency_limit=None)
        self.blocks.load(answers.open, None, [answers.status, answers.watch, self.tick], queue=False)
        self.blocks.unload(self._leave)
        # queue=False: the queue would open a stream of answers each time.
        self.timer.tick(self._see, None, seen, queue=False)
        # Polls again, since a comparison may load more.
        gr.on(
            [answers.compare.click, self.chat.composer.send.click],
            lambda: {self.timer: gr.Timer(active=True), **self.notice.quiet()},
            None,
            [self.timer, self.notice.message],
            queue=False,
        )
        self.server.connect(self.tabs)
        for chosen, other in (
            (answers.picker.words, self.lab_flags),
            (answers.network.link, self.model.fields["link"]),
        ):
            chosen.change(None, chosen, other, js="same => same")
        self.lab.connect(self.lab_flags, answers.fields["prompt"], self.lab_error)
        self.attacks.connect(answers.fields["prompt"])
        self.model.connect(answers.picker.words, self._read, [*seen, *read])
        self._follow([*answers.picker.outputs, answers.network.costs, *seen, *read])

    def _follow(self, drawn: list[Any]) -> None:
        """Show the model and cut in use after this visitor or another one has changed them."""
        answers = self.answers
        given = {answers.picker.words, answers.network.link, answers.history.kept, self.notice.shown}
        loaded = self.models.connect().then(self._anew, given, drawn, concurrency_limit=None)
        changed = gr.on(
            self.notice.connect(), self._changed, given, [*drawn, self.notice.message], concurrency_limit=None
        )
        for event in (loaded, changed):
            event.then(self.model.anew, self.model.given, self.model.all, concurrency_limit=None)

    async def _open(self) -> AsyncIterator[Updates]:
        """On opening the page: show the model once it is read, and the available flags once the trunk has answered. The
        flags' words are not set, since a quick visitor may have typed others."""
        yield self._see()
        while not self.handlers.startup.settled(MODEL):
            await asyncio.sleep(POLL_S)
        yield await asyncio.to_thread(self._read)
        while not self.handlers.startup.settled(MODEL, TRUNK):
            await asyncio.sleep(POLL_S)
        yield await asyncio.to_thread(self._flags, self.runs.config.flags)

    def _anew(self, given: Mapping[Any, Any], request: gr.Request) -> Updates:
        """Show the model and the cut in use outside the tab Model and cut."""
        answers = self.answers
        costs = answers.network.anew(given[answers.network.link], given[answers.history.kept], request)
        return {**self._flags(given[answers.picker.words] or ""), **self._read(), **costs}

    def _changed(self, given: Mapping[Any, Any], request: gr.Request) -> Updates:
        """Show the model and cut that another visitor chose, with a notice."""
        return {**self.notice.news(given[self.notice.shown]), **self._anew(given, request)}

    def _read(self) -> Updates:
        """Show the model."""
        if self.handlers.startup.failure:
            return self._see()
        model, config = self.runs.model, self.runs.config
        return {
            **self._see(),
            self.facts: view.facts(config, model),
            **self.notice.seen(),
            self.intro: intro.picture(model, self.handlers.attacks.known()),
            self.answers.split_facts: view.split_facts(config, model),
            self.answers.fields["form"]: gr.Radio(inputs.forms(model.capabilities.chat_templates)),
        }

    def _flags(self, words: str) -> Updates:
        """Show the flags of `words` with their availability now."""
        if self.handlers.startup.failure:
            return self._see()
        known, failure, picker = flag_words.available(self.runs), {}, self.answers.picker
        try:
            flags = parse(words, known)
        except InputError as error:  # names a flag that is unavailable here now
            words, failure = "auto", {picker.words: "auto", self.answers.error: html.error(str(error))}
            flags = parse(words, known)
        return {**picker.show(flags, known, words), **self._see(), **failure}

    def _leave(self, request: gr.Request) -> None:
        self.handlers.leave(visitor(request))
        self.lab.watches.leave(visitor(request))
        self.attacks.watches.leave(visitor(request))
        self.answers.flag_table.watches.leave(visitor(request))

    def _see(self) -> Updates:
        """Show what is loading, and the public link."""
        startup = self.handlers.startup
        running = startup.running
        return {
            self.link: html.note(self.sharing.message),
            self.startup: view.startup(startup.parts(), running),
            self.timer: gr.Timer(active=running or self.sharing.state == "asked"),
        }
