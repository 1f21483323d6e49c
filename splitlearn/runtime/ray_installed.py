"""Whether Ray is installed: it is not among the program's requirements."""

from importlib.util import find_spec

from splitlearn.errors import SetupError

INSTALL = "pip install -r requirements-ray.txt, or pip install 'splitlearn[ray]'"


def check(field: str) -> None:
    """Raise SetupError, which names `field`, unless Ray is installed."""
    if find_spec("ray") is None:
        raise SetupError(f"{field}: Ray is not installed here. Install it: {INSTALL} (docs/ray.md).")
