"""The login page. It replaces Gradio's, which has no title, heading, landmarks or Chinese."""

from functools import cache
from pathlib import Path

from splitlearn.reporting.page import render
from ui.language import choice, translation
from ui.theme import PAGE

TEMPLATE = Path(__file__).with_name("login.html.jinja")


@cache
def html(language: choice.Language) -> str:
    """The login page as HTML. Its form is sent to Gradio's login."""
    made = render(
        TEMPLATE,
        plotly=False,
        tag=choice.TAGS[language],
        look=PAGE,
        links=choice.links(),
        keep_query=choice.KEEP_QUERY,
    )
    return translation.html(made) if language == choice.CHINESE else made
