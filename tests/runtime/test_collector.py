"""The garbage collector rests while much is imported."""

import sys

from tests.support.children import output_of

CODE = """
import gc
from splitlearn.runtime import collector
before = gc.get_freeze_count()
with collector.resting():
    resting = not gc.isenabled()
print(resting, gc.isenabled(), gc.get_freeze_count() > before)
"""


def test_it_rests_inside_and_then_passes_over_what_is_there() -> None:
    assert output_of([sys.executable, "-c", CODE]) == "True True True\n"
