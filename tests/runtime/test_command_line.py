"""A command line that is wrong is one line, whichever program it is for."""

import pytest

from server.__main__ import main as serve
from splitlearn.cli.main import main as command
from ui.app import main as page


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (serve, ["--prt"], "No such option: --prt"),
        (serve, ["--port", "abc"], "port: 'abc' cannot be used; expected a whole number"),
        (page, ["--port", "abc"], "port: 'abc' cannot be used; expected a whole number"),
        (page, ["surplus"], "Got unexpected extra argument(s) (surplus)"),
        (command, ["compare", "--warp"], "No such option: --warp"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(
    main: object, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(main) and main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {said}") and err.count("\n") == 1
