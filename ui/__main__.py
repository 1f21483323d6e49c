"""`python -m ui`: what `splitlearn ui` runs; app.py in a checkout is the same."""

import sys

from ui.app import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
