"""The flag picker: controls made from the registry. The text in `words` is the state; the other controls follow it."""

import json
from html import escape
from typing import Any

import gradio as gr

from splitlearn.arms.runs import Runs
from splitlearn.errors import SplitlearnError
from splitlearn.flags.registry import FLAGS, SIDES, Flag, Place
from splitlearn.flags.selection import Availability, FlagSet, parse
from ui import html, inputs
from ui.flags import badges, flag_words

Updates = dict[Any, Any]
CARD = ["sl-flag"]
PRESETS_HELP = (
    "auto: the fastest set that leaves the tokens as they are. fast: weights in 4 bits. The earlier-* presets repeat "
    "an earlier system's comparison. They and 'all' compile: minutes at first. fast and 'all' are lossy."
)
WORDS_HELP = (
    "As on the command line: a set as above, a list such as use_cache,inference_mode, or one for each side, such as "
    "full:all client:use_cache trunk:none"
)


class Picker:
    """The picker's components, built inside a `gr.Blocks`. `connect` adds the handlers.

    `place` is where the arms probably compute: the flags that `auto` applies there come first. Flags that turn out not
    to act here are folded.
    """

    def __init__(self, at_first: str, place: Place) -> None:
        self.preset = gr.Radio(list(flag_words.NAMES), label="Set of flags", info=PRESETS_HELP)
        self.auto = gr.HTML("", elem_id="auto")
        gr.Markdown("Applied on every side where the flag acts:", elem_classes="sl-small")
        self.flags: dict[str, Any] = {}
        self.cards: dict[str, Any] = {}
        with gr.Row(elem_classes="sl-flags"):
            for name in flag_words.useful_first(place):
                with gr.Column(elem_classes=CARD, min_width=200) as self.cards[name]:
                    self.flags[name] = _control(FLAGS[name])
                    gr.HTML(badges.about(FLAGS[name], None))
        self.cannot = gr.HTML("", elem_id="flags-cannot")
        # In the same accordion as the controls: a field that was never on the screen keeps its first value in Gradio.
        self.words = gr.Textbox(at_first, label="Flags in words", info=WORDS_HELP, elem_id="flag-words")
        # Its own error box: the response to typing may come after that of a button pressed next, and would clear its
        # error.
        self.error = gr.HTML("", elem_id="flags-error")
        with gr.Accordion("Advanced: choose for each side", open=False, elem_id="sides"):
            self.sides = {side: gr.CheckboxGroup([], label=f"Applied on {side}") for side in SIDES}
        with gr.Accordion("Flags by side: applied, available, or why not", open=False, elem_id="by-side"):
            self.matrix = gr.HTML("", elem_id="matrix")
        self.controls: dict[str, Any] = {"preset": self.preset, **self.flags}
        self.controls |= {str(side): group for side, group in self.sides.items()}
        # JSON of what the controls were last set to, by name: what differs was pressed since. It is in the page, so
        # that it changes together with the controls.
        self.drawn = gr.Textbox("{}", visible="hidden")

    @property
    def outputs(self) -> list[Any]:
        """The components that show a choice of flags."""
        shown = [*self.controls.values(), *self.cards.values(), self.words, self.drawn]
        return [*shown, self.auto, self.cannot, self.matrix]

    @property
    def given(self) -> set[Any]:
        """The components that `chosen` reads."""
        return {*self.controls.values(), self.words, self.drawn}

    def chosen(self, sent: Updates, runs: Runs) -> str:
        """The words for what was pressed and typed, of which the page may not have been told yet. Raises InputError."""
        return self._chosen(sent, flag_words.available(runs))[0] if self._pressed(sent) else sent[self.words] or ""

    def connect(self, runs: Runs) -> None:
        """Let each control change the words, and with them the other controls. Errors appear below the words."""

        def change(sent: Updates) -> Updates:
            try:
                known = flag_words.available(runs)
                words, flags = self._chosen(sent, known)
            except SplitlearnError as problem:
                return {self.error: html.error(str(problem)), self.drawn: json.dumps(self._as_sent(sent))}
            new = {self.words: words} if words != sent[self.words] else {}
            return {**self.show(flags, known, words, sent), **new, self.error: ""}

        # One event for all. Two would be answered side by side, and the second not know what the first one changed.
        ways = [control.input for control in self.controls.values()] + [self.words.submit, self.words.blur]
        gr.on(ways, change, self.given, [*self.outputs, self.error], trigger_mode="always_last")

    def _chosen(self, sent: Updates, known: Availability) -> tuple[str, FlagSet]:
        """The words and flags after what was pressed and typed. Raises InputError."""
        now, pressed = self._as_sent(sent), self._pressed(sent)
        # Typed words stay as they are, since the lab's ladder adds flags in their order.
        words = str((now["preset"] if "preset" in pressed else sent[self.words]) or "")
        flags = parse(words, known)
        if pressed <= {"preset"}:
            return words, flags
        for name in (name for name in FLAGS if name in pressed):
            flags = flag_words.with_choice(flags, name, _choice(FLAGS[name], now[name]), known)
        if pressed & set(SIDES):
            lists = {side: now[side] if side in pressed else sorted(flags.of(side)) for side in SIDES}
            flags = parse(flag_words.on_sides(lists), known)
        return flag_words.words(flags, known), flags

    def _pressed(self, sent: Updates) -> set[str]:
        """The names of the controls that were pressed since they were drawn."""
        now, was = self._as_sent(sent), inputs.drawn(sent[self.drawn])
        return {name for name in self.controls if now[name] != was.get(name, now[name])}

    def _as_sent(self, sent: Updates) -> Updates:
        """The values of the controls by name."""
        return {name: _sorted(sent[control]) for name, control in self.controls.items()}

    def show(self, flags: FlagSet, known: Availability, words: str, sent: Updates | None = None) -> Updates:
        """Set every control but the words to `flags`, for which these are the words.

        Controls that had the right value when they were `sent` are left alone: they may have been pressed since.
        """
        why_not = {name: flag_words.why_nowhere(name, known) for name in FLAGS}
        values: Updates = {"preset": words if words in flag_words.NAMES else flag_words.set_of(flags, known)}
        values |= {name: _value(flag, flag_words.choice_of(flags, name, known)) for name, flag in FLAGS.items()}
        values |= {side: sorted(flags.of(side)) for side in SIDES}
        sent_values = self._as_sent(sent) if sent else {}
        new = {
            name: {} if name in sent_values and sent_values[name] == value else {"value": value}
            for name, value in values.items()
        }
        flags_shown = {
            control: _kind(FLAGS[name])(interactive=why_not[name] is None, **new[name])
            for name, control in self.flags.items()
        }
        cards = {
            card: gr.Column(elem_classes=[*CARD, *(["sl-cannot"] if why_not[name] else [])])
            for name, card in self.cards.items()
        }
        sides = {
            group: gr.CheckboxGroup(choices=_texts(known[side]), **new[side]) for side, group in self.sides.items()
        }
        return {
            **flags_shown,
            **cards,
            **sides,
            self.preset: gr.Radio(**new["preset"]),
            self.drawn: json.dumps(values),
            self.cannot: badges.cannot({name: reason for name, reason in why_not.items() if reason}),
            self.auto: f'<p class="sl-small">{escape(flag_words.about_auto(known))}</p>',
            self.matrix: badges.matrix(known, flags),
        }


def _control(flag: Flag) -> Any:
    """The control of `flag`. It cannot be pressed before it shows what is chosen."""
    name = f"flag-{flag.name}"
    if _kind(flag) is gr.Checkbox:
        return gr.Checkbox(label=flag.label, container=False, interactive=False, elem_id=name)
    choices = [(f"{choice} (off)" if choice == flag.off != "off" else choice, choice) for choice in flag.choices]
    return gr.Radio(choices, label=flag.label, interactive=False, elem_id=name)


def _kind(flag: Flag) -> Any:
    return gr.Checkbox if len(flag.choices) == 2 else gr.Radio


def _value(flag: Flag, chosen: str | None) -> bool | str | None:
    """The value of the control of `flag` for one of its choices, or for None where sides differ."""
    return chosen == flag.applied if _kind(flag) is gr.Checkbox else chosen


def _choice(flag: Flag, value: bool | str) -> str:
    """The choice of `flag` for the value of its control."""
    if isinstance(value, bool):
        return flag.applied if value else flag.off
    return str(value)


def _sorted(value: Any) -> Any:
    """A group of boxes has its values in the order of pressing."""
    return sorted(value) if isinstance(value, list) else value


def _texts(reasons: Any) -> list[str]:
    """The choices of a side: the name of each available flag, and name=choice for its other choices."""
    return [
        name if chosen == flag.applied else f"{name}={chosen}"
        for name, flag in FLAGS.items()
        if reasons[name] is None
        for chosen in flag.choices
        if chosen != flag.off and reasons.get(f"{name}={chosen}") is None
    ]
