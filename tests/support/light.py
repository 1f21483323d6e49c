"""All that the page imports, for the tests' fork server to load before torch; LIGHT has the names of the modules."""

import sys

from splitlearn.runtime import private_apis

with private_apis.without_stub_files():
    import gradio  # noqa: F401
import ui.app
import ui.page  # noqa: F401

LIGHT = frozenset(sys.modules)
assert "torch" not in LIGHT, "the fork server has to import this first"
