"""Measurements that back the claims of the docs.

Nothing timed is asserted in a test: a timing is a ratio inside one run, given with its interval.

`python -m bench` runs all of them, `python -m bench overhead` one; each writes a page in docs/results/.
"""
