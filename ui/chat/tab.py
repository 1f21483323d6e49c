"""The Chat tab: one conversation with both arms.

A turn is a comparison with one run of each arm, in the queue of all runs. Flags, settings and network are those that
the Answers tab has chosen.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from splitlearn.arms.startup import MODEL
from splitlearn.errors import SplitlearnError
from ui import html, inputs
from ui.chat import record, view
from ui.chat.composer import BACK_TO_FIELD, TAKE, TO_FIELD, Composer
from ui.chat.conversation import Conversation, Turn
from ui.compare.actions import Handlers
from ui.compare.session import ArmView, ComparisonView
from ui.compare.tab import AnswersTab
from ui.compare.view import errors, status
from ui.flags.picker import Updates
from ui.history.panel import SCRAMBLED_WITH
from ui.visitors import visitor

NAME = "Chat"
WHAT = (
    "One conversation, sent to both arms. Each turn runs once in each, one after the other, in random order. The next "
    "prompt has the full arm's answers, for both arms: else their prompts would differ, and their tokens could not be "
    "compared. So the verdict of each turn stands by itself. Your browser keeps the conversation until you begin a new "
    "one."
)
SYSTEM = "The first message of every prompt from the next turn on. Without one, some chat templates add their own."
STORAGE_KEY = "splitlearn-chat"  # scrambled like the history
TICK_S = 1.0
TO_TURNS = "() => document.getElementById('chat-box').scrollIntoView({block: 'start'})"
TO_IDS = "() => document.querySelector('#chat-prompt h2')?.focus()"


def storage() -> Any:
    """What the browser keeps, built outside all tabs: in one that is not open Gradio would not read it."""
    return gr.BrowserState(record.EMPTY, storage_key=STORAGE_KEY, secret=SCRAMBLED_WITH)


class ChatTab:
    """The tab's components, built inside `tab`. `connect` adds their event handlers. `kept` is the `storage`."""

    def __init__(self, handlers: Handlers, answers: AnswersTab, tab: Any, kept: Any) -> None:
        self.handlers, self.answers, self.tab, self.kept = handlers, answers, tab, kept
        self.talk = gr.State(Conversation())
        self.tick = gr.Timer(TICK_S, active=False)
        with gr.Column(elem_id="chat"):
            gr.HTML(f'<h2>Conversation</h2><p class="sl-small">{WHAT}</p>', elem_classes="sl-report")
            self.system = gr.Textbox("", label="System prompt", info=SYSTEM, max_lines=6, elem_id="chat-system")
            self.settings = gr.HTML("", elem_id="chat-settings")
            with gr.Column(elem_id="chat-box"), gr.Column(elem_id="chat-turns"):
                gr.HTML(html.small(view.EMPTY), elem_id="chat-empty")
                self.past = gr.HTML("", js_on_load=view.PRESS, elem_id="chat-past")
                self.now = gr.HTML("", js_on_load=view.PRESS, elem_id="chat-now")
            self.composer = Composer()
            self.prompt = gr.HTML("", elem_id="chat-prompt", elem_classes="sl-report")

    def connect(self, blocks: Any) -> None:
        """Add the event handlers, which show the browser's conversation when the page opens."""
        blocks.load(self._open, self.kept, [self.talk, self.past, self.system], queue=False)
        fields, words, composer = self.answers.fields, self.answers.picker.words, self.composer
        chosen = {words, *(fields[name] for name in ("link", "max_new_tokens", "temperature"))}
        shown = [self.settings, composer.context]
        gr.on([self.tab.select, words.change], self._come, {*chosen, self.talk}, shown, queue=False)
        composer.stop.click(self._stop, None, composer.stop, queue=False)
        self.tick.tick(self._wait, None, [composer.status, composer.watch], queue=False)
        given = {self.talk, composer.message}
        drawn = [self.talk, self.past, self.now, self.prompt, *composer.all]
        turns = [self.past, self.now]
        for act, events in {
            self._edit: [each.edit for each in turns],
            self._cancel: [composer.cancel.click],
            self._new: [composer.new.click],
        }.items():
            gr.on(events, act, given, [*drawn, self.kept], queue=False).then(None, None, None, js=TO_FIELD)
        asked = gr.on(
            [each.select for each in turns], self._token_ids, given, [self.prompt, composer.error], queue=False
        )
        asked.then(None, None, None, js=TO_IDS)
        begins = [*drawn, self.settings, self.tick]
        sent = gr.on(
            [composer.send.click, composer.message.submit],
            self._send,
            {*given, *chosen},
            [*begins, composer.sent],
            queue=False,
        )
        sent.then(None, [composer.sent, composer.message], composer.message, js=TAKE)
        again = gr.on([each.retry for each in turns], self._retry, {*given, *chosen}, begins, queue=False)
        for begun in (sent, again):
            self._run_after(begun)

    def _run_after(self, begun: Any) -> None:
        """Run the turn in the queue of all runs, and reset the buttons in any case."""
        begun.then(None, None, None, js=TO_TURNS)
        ran = begun.then(
            self._run,
            {*self.answers.fields.values(), self.answers.picker.words, self.system, self.talk},
            [self.talk, self.now, *self.composer.said, self.tick],
            concurrency_id="runs",
            concurrency_limit=1,
            trigger_mode="once",
        )
        given = {self.talk, self.system, self.composer.message}
        ended = ran.then(self._end, given, [*self.composer.all, self.tick, self.kept], queue=False)
        ended.then(None, None, None, js=BACK_TO_FIELD)

    def _open(self, kept: object) -> Updates:
        """On opening the page. Without a conversation nothing is set, since a quick visitor may have typed already."""
        talk, system = record.read(kept)
        if not talk.turns:
            return {self.talk: gr.skip()}
        return {self.talk: talk, self.past: view.turns(talk.turns), self.system: system}

    def _come(self, given: Mapping[Any, Any]) -> Updates:
        """On opening the tab."""
        return {**self._choices(given), **self._room(given[self.talk])}

    def _choices(self, given: Mapping[Any, Any]) -> Updates:
        """Show what is chosen on the Answers tab."""
        fields = self.answers.fields
        link, tokens, temperature = (str(given[fields[name]]) for name in ("link", "max_new_tokens", "temperature"))
        words = str(given[self.answers.picker.words] or "")
        return {self.settings: view.settings(words, link, tokens, temperature)}

    def _room(self, talk: Conversation) -> Updates:
        startup, shown = self.handlers.startup, ""
        if startup.settled(MODEL) and not startup.failure:
            shown = view.context(talk.before, self.handlers.runs.files.facts.context_length)
        return {self.composer.context: shown}

    def _send(self, given: Mapping[Any, Any], request: gr.Request) -> Updates:
        talk: Conversation = given[self.talk]
        said = given[self.composer.message] or ""
        return {**self._choices(given), **self._begin(talk.ask(said), request), self.composer.sent: said}

    def _retry(self, given: Mapping[Any, Any], request: gr.Request, event: gr.EventData) -> Updates:
        """Run an answered turn again, and drop those after it."""
        talk: Conversation = given[self.talk]
        try:
            talk = talk.edit(_number(event))
        except SplitlearnError as error:
            return {self.talk: Conversation(talk.turns), self.composer.error: html.error(str(error))}
        return {**self._choices(given), **self._begin(talk.ask(talk.turns[len(talk.before)].said), request)}

    def _begin(self, talk: Conversation, request: gr.Request) -> Updates:
        place = self.handlers.begin(visitor(request))
        shown = ComparisonView(ArmView("full", "waiting"), ArmView("split", "waiting"))
        return {
            self.talk: talk,
            self.past: view.turns(talk.before),
            self.now: self._turn(talk, shown),
            self.prompt: "",
            self.tick: gr.Timer(active=place > 0),
            **self.composer.begin(),
            **self.composer.say(
                status(shown, place, self.handlers.line.runs_request), self.handlers.running if place else None
            ),
        }

    def _run(self, given: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Run the turn in both arms, and draw what changed."""
        talk, before = given[self.talk], None
        yield {self.tick: gr.Timer(active=False)}
        if talk.asked is None:  # taken back before it began, by a press before the buttons were disabled
            return
        who = visitor(request)
        with self.handlers.line.turn(who, self.handlers.stops.signal(who)):
            try:
                typed = self._typed(given, talk)
            except SplitlearnError as error:
                yield {self.composer.error: html.error(str(error)), self.now: "", **self.composer.say("")}
                return
            for shown in self.handlers.compare(typed, given[self.answers.picker.words] or "", visitor(request)):
                if changes := self._changes(before, shown, talk):
                    yield changes
                before = shown
        if before is not None:
            yield {self.talk: talk.answered(before)}

    def _typed(self, given: dict[Any, Any], talk: Conversation) -> dict[str, object]:
        """The fields of the Answers tab, with the conversation as the prompt. Raises InputError."""
        typed = {name: given[component] for name, component in self.answers.fields.items()}
        form = inputs.CHAT if typed["form"] == inputs.RAW else typed["form"]
        messages = talk.messages(given[self.system] or "")
        return {**typed, "prompt": messages, "form": form, "pairs": 1, "samples": 1}

    def _changes(self, before: ComparisonView | None, shown: ComparisonView, talk: Conversation) -> Updates:
        """The updates since `before`. Drawing less takes less time from a run on the same cores."""
        updates: Updates = {}
        if before is None or errors(shown) != errors(before):
            updates[self.composer.error] = errors(shown) + html.small(view.refusal(shown))
        if before is None or status(shown) != status(before):
            updates |= self.composer.say(status(shown))
        if before is None or shown != before:
            updates[self.now] = "" if shown.error else self._turn(talk, shown)
        return updates

    def _turn(self, talk: Conversation, shown: ComparisonView) -> str:
        turn = Turn(talk.asked or "", shown)
        return view.turn(len(talk.before) + 1, turn, kept=shown.ended and turn.answer is not None)

    def _end(self, given: Mapping[Any, Any], request: gr.Request) -> Updates:
        self.handlers.line.leave(visitor(request))
        talk: Conversation = given[self.talk]
        kept, room = record.text(talk, given[self.system] or ""), self._room(talk)
        if talk.turns and kept == record.EMPTY:
            room[self.composer.context] += html.small(view.NOT_STORED)
        return {
            self.kept: kept,
            self.tick: gr.Timer(active=False),
            **self.composer.end(talk, given[self.composer.message] or ""),
            **room,
        }

    def _edit(self, given: Mapping[Any, Any], event: gr.EventData) -> Updates:
        """Take the message of an answered turn into the field."""
        talk: Conversation = given[self.talk]
        try:
            talk = talk.edit(_number(event))
        except SplitlearnError as error:
            return {self.composer.error: html.error(str(error))}
        said = talk.turns[len(talk.before)].said
        composer = self.composer
        return {
            self.talk: talk,
            composer.message: said,
            composer.error: "",
            **composer.replacing(talk),
            **self._room(talk),
        }

    def _cancel(self, given: Mapping[Any, Any]) -> Updates:
        return self._show(Conversation(given[self.talk].turns))

    def _new(self, given: Mapping[Any, Any]) -> Updates:
        return {**self._show(Conversation()), self.kept: record.EMPTY}

    def _show(self, talk: Conversation) -> Updates:
        cleared = dict.fromkeys((self.now, self.prompt, self.composer.message, self.composer.error), "")
        shown = {self.talk: talk, self.past: view.turns(talk.turns), **cleared}
        return {**shown, **self.composer.say(""), **self.composer.replacing(talk), **self._room(talk)}

    def _token_ids(self, given: Mapping[Any, Any], event: gr.EventData) -> Updates:
        """Show the token ids of a turn's prompt."""
        turns = given[self.talk].turns
        try:
            at = given[self.talk].index(_number(event))
        except SplitlearnError as error:
            return {self.composer.error: html.error(str(error))}
        return {self.prompt: view.token_ids(at + 1, turns[at])}

    def _stop(self, request: gr.Request) -> Any:
        self.handlers.stops.stop(visitor(request))
        return gr.Button(interactive=False)

    def _wait(self, request: gr.Request) -> Updates:
        """Show the visitor's place in the queue."""
        place = self.handlers.line.place(visitor(request))
        if place > 0:
            return self.composer.say(
                status(ComparisonView(), place, self.handlers.line.runs_request), self.handlers.running
            )
        return {self.composer.status: gr.skip()}  # her own run reports its status, or her turn comes next


def _number(event: gr.EventData) -> object:
    """The turn whose button was pressed, as the browser says it; None without one."""
    try:
        return event.turn
    except (AttributeError, TypeError):
        return None
