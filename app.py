"""The page: `python app.py [--config config.yaml] [--share]`; `--help` lists the rest."""

import sys


def main() -> int:
    """Serve the page until interrupted. Returns the exit status."""
    from ui.app import main as launch  # here, since every worker process imports this file again

    return launch(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
