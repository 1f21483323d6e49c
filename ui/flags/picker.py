"""The flag picker: controls made from the registry. The text in `words` is the state; the other controls follow it."""

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from splitlearn.arms.runs import Runs
from splitlearn.errors import SplitlearnError
from splitlearn.flags.registry import FLAGS, SIDES, Flag, Place
from splitlearn.flags.selection import Availability, FlagSet, parse
from ui import html
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

    @property
    def outputs(self) -> list[Any]:
        """The components that show a choice of flags."""
        controls = [*self.flags.values(), *self.cards.values(), *self.sides.values()]
        return [self.preset, self.auto, *controls, self.cannot, self.words, self.matrix]

    def connect(self, runs: Runs) -> None:
        """Let each control change the words, and with them the other controls. Errors appear below the words."""
        outputs = [*self.outputs, self.error]

        def at(flags_of: Callable[[Availability], FlagSet], *, typed: str | None = None) -> Updates:
            try:
                known = flag_words.available(runs)
                flags = flags_of(known)
            except SplitlearnError as problem:
                return {self.error: html.error(str(problem))}
            # Typed words stay as they are, since the lab's ladder adds flags in their order.
            words = {} if typed is not None else {self.words: flag_words.words(flags, known)}
            return {**self.show(flags, known, typed), **words, self.error: ""}

        def on_typed(text: str) -> Updates:
            return at(lambda known: parse(text or "", known), typed=text or "")  # an API client may send None

        def on_preset(name: str) -> Updates:
            return {**on_typed(name), self.words: name}

        def on_flag(name: str) -> Callable[[Any, str], Updates]:
            def change(value: Any, text: str) -> Updates:
                chosen = _chosen(FLAGS[name], value)
                return at(lambda known: flag_words.with_choice(parse(text or "", known), name, chosen, known))

            return change

        def on_sides(*lists: list[str]) -> Updates:
            words = flag_words.on_sides(dict(zip(SIDES, lists, strict=True)))
            return at(lambda known: parse(words, known))

        self.preset.input(on_preset, self.preset, outputs)
        for name, control in self.flags.items():
            control.input(on_flag(name), [control, self.words], outputs)
        for group in self.sides.values():
            group.input(on_sides, list(self.sides.values()), outputs)
        gr.on([self.words.submit, self.words.blur], on_typed, self.words, outputs)

    def show(self, flags: FlagSet, known: Availability, typed: str | None = None) -> Updates:
        """Set every control but the words to `flags`. Two sets may be the same here: `typed` names the one meant."""
        why_not = {name: flag_words.why_nowhere(name, known) for name in FLAGS}
        controls = {
            control: _update(FLAGS[name], flag_words.choice_of(flags, name, known), why_not[name])
            for name, control in self.flags.items()
        }
        cards = {
            card: gr.Column(elem_classes=[*CARD, *(["sl-cannot"] if why_not[name] else [])])
            for name, card in self.cards.items()
        }
        sides = {
            group: gr.CheckboxGroup(choices=_texts(known[side]), value=sorted(flags.of(side)))
            for side, group in self.sides.items()
        }
        return {
            **controls,
            **cards,
            **sides,
            self.cannot: badges.cannot({name: reason for name, reason in why_not.items() if reason}),
            self.preset: typed if typed in flag_words.NAMES else flag_words.set_of(flags, known),
            self.auto: f'<p class="sl-small">{escape(flag_words.about_auto(known))}</p>',
            self.matrix: badges.matrix(known, flags),
        }


def _control(flag: Flag) -> Any:
    if len(flag.choices) == 2:
        return gr.Checkbox(label=flag.label, container=False, elem_id=f"flag-{flag.name}")
    choices = [(f"{name} (off)" if name == flag.off != "off" else name, name) for name in flag.choices]
    return gr.Radio(choices, label=flag.label, elem_id=f"flag-{flag.name}")


def _update(flag: Flag, chosen: str | None, why_not: str | None) -> Any:
    """Set the control of `flag` to a choice, or to none where sides differ. It is disabled if no side can apply it."""
    if len(flag.choices) == 2:
        return gr.Checkbox(value=chosen == flag.applied, interactive=why_not is None)
    return gr.Radio(value=chosen, interactive=why_not is None)


def _chosen(flag: Flag, value: Any) -> str:
    """The value of the control of `flag`, as one of the flag's choices."""
    if isinstance(value, bool):
        return flag.applied if value else flag.off
    return str(value)


def _texts(reasons: Any) -> list[str]:
    """The choices of a side: the name of each available flag, and name=choice for its other choices."""
    return [
        name if chosen == flag.applied else f"{name}={chosen}"
        for name, flag in FLAGS.items()
        if reasons[name] is None
        for chosen in flag.choices
        if chosen != flag.off and reasons.get(f"{name}={chosen}") is None
    ]
