"""Which language a visitor reads: the one she chose, else the one her browser asks for.

English is at `/`, which sends on to the page of another language: Gradio's scripts read in the address which it is.
"""

from typing import Literal, get_args

from starlette.requests import Request

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
CHINESE: Language = "zh"
NAMES: dict[Language, str] = {"en": "English", "zh": "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}"}
TAGS: dict[Language, str] = {"en": "en", "zh": "zh-CN"}
NAME = "language"  # of the query parameter, and of the cookie that keeps it
PAGES: dict[str, Language] = {"/": "en", "/zh": "zh"}
"""Where the page is in each language."""
MAX_AGE_S = 365 * 24 * 3600
KEEP_QUERY = """() => {
  for (const link of document.querySelectorAll('.sl-language a')) {
    const query = new URLSearchParams(location.search);
    for (const [name, value] of new URLSearchParams(link.search)) query.set(name, value);
    link.search = query;
  }
}"""
"""A script for a page with `links`: they keep what else its address says, such as ?__theme=dark."""


def in_address(request: Request) -> Language | None:
    """The language that the address names."""
    return _known(request.query_params.get(NAME))


def of(request: Request) -> Language:
    """The language for `request`: its address, its cookie, then the browser's list."""
    return (
        in_address(request)
        or _known(request.cookies.get(NAME))
        or _preferred(request.headers.get("accept-language", ""))
    )


def cookie(chosen: Language) -> str:
    """What keeps a choice in the browser."""
    return f"{NAME}={chosen}; Max-Age={MAX_AGE_S}"


def links() -> str:
    """The choice, as links."""
    listed = " / ".join(
        f'<a href="?{NAME}={each}" lang="{TAGS[each]}" hreflang="{TAGS[each]}">{NAMES[each]}</a>' for each in LANGUAGES
    )
    return f'<nav class="sl-language" aria-label="Language">{listed}</nav>'


def _known(name: str | None) -> Language | None:
    return next((each for each in LANGUAGES if each == name), None)


def _preferred(header: str) -> Language:
    """The first of a browser's languages that the page has. Browsers send the one they like best first."""
    tags = (tag.partition(";")[0].strip().lower() for tag in header[:1000].split(","))
    found = (_known(tag.partition("-")[0]) for tag in tags)
    return next((each for each in found if each), "en")
