"""`python -m splitlearn`."""

import sys

from splitlearn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
