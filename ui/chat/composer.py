"""Below a conversation: the field for the next message, the buttons, and what is said of a turn under way."""

from typing import Any

import gradio as gr

from ui import html
from ui.chat.conversation import Conversation
from ui.compare.progress import progress
from ui.compare.session import ComparisonView
from ui.flags.picker import Updates

EDITING = "Send runs this turn again and drops the turns after it. Cancel leaves the conversation as it is."
TO_FIELD = "() => document.querySelector('#chat-message textarea').focus()"
# The field was disabled during the run, which took the focus from it.
BACK_TO_FIELD = f"() => document.activeElement === document.body && ({TO_FIELD})()"

# A message stays in its field until the program has it. Then only what was typed meanwhile is left.
TAKE = "(sent, typed) => typed.startsWith(sent) ? typed.slice(sent.length) : typed"


class Composer:
    """The components, and the updates that more than one action needs."""

    def __init__(self) -> None:
        self.context = gr.HTML("", elem_id="chat-context")
        self.editing = gr.HTML("", elem_id="chat-editing")
        self.message = gr.Textbox(
            "", label="Message", info="Shift+Enter sends.", lines=2, max_lines=8, elem_id="chat-message"
        )
        self.sent = gr.Textbox("", visible="hidden")  # the message that the program has
        with gr.Row(elem_id="chat-actions"):
            self.send = gr.Button("Send", variant="primary", scale=3, min_width=120, elem_id="chat-send")
            self.stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="chat-stop")
            self.cancel = gr.Button("Cancel", visible=False, min_width=80, elem_id="chat-cancel")
            self.new = gr.Button("New conversation", min_width=140, elem_id="chat-new")
        self.status = gr.HTML(html.status(""), elem_id="chat-status")
        self.watch = gr.HTML("", elem_id="chat-watch")
        self.error = gr.HTML("", elem_id="chat-error")

    @property
    def said(self) -> list[Any]:
        """The components that a run changes."""
        return [self.status, self.watch, self.error]

    @property
    def all(self) -> list[Any]:
        """All components."""
        return [*self.said, self.context, self.editing, self.message, self.send, self.stop, self.cancel, self.new]

    def begin(self) -> Updates:
        """A turn begins. `TAKE` takes its message out of the field."""
        return {
            self.message: gr.Textbox(interactive=False),
            self.error: "",
            self.editing: "",
            self.cancel: gr.Button(visible=False),
            **self._buttons(running=True),
        }

    def end(self, talk: Conversation, typed: str) -> Updates:
        """A turn has ended: the message of one without the full arm's answer comes back into the field, before what is
        `typed` there."""
        message = gr.Textbox("\n".join(text for text in (talk.asked, typed) if text), interactive=True)
        return {self.message: message, **self._buttons(running=False), **self.replacing(talk)}

    def replacing(self, talk: Conversation) -> Updates:
        """Say which turn the next message replaces, if it does."""
        said = "" if talk.at is None else html.small(f"Editing turn {talk.at + 1}.") + html.small(EDITING)
        return {self.editing: said, self.cancel: gr.Button(visible=talk.at is not None)}

    def say(self, text: str, running: ComparisonView | None = None) -> Updates:
        """The status line, and the progress of another visitor's comparison while this one waits for it."""
        return {self.status: html.status(text), self.watch: progress(running)}

    def _buttons(self, running: bool) -> Updates:
        enabled = {each: gr.Button(interactive=not running) for each in (self.send, self.new)}
        return {**enabled, self.stop: gr.Button(interactive=running)}
