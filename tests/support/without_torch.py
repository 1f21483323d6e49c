"""`app.py` in a process that cannot import torch or transformers: the page's process must never need them.

Its workers can: they are other processes, in which this file is not the main one.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

FORBIDDEN = ("torch", "transformers")


class Refuser(MetaPathFinder):
    """Refuses to import the packages in FORBIDDEN."""

    def find_spec(self, name: str, *_: object) -> None:
        if name in FORBIDDEN:
            raise ImportError(f"the page's process imports {name}")


if __name__ == "__main__":
    sys.meta_path.insert(0, Refuser())
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from app import main

    sys.exit(main())
