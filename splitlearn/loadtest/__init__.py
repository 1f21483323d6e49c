"""Load test of a trunk server: many clients at once.

`plan` has the requests, `arrivals` when each begins, `clients` what answers them: real split clients in processes of
their own, or threads that replay recorded hidden states. `driver` runs them, `summary` computes the figures, goodput
among them, and `report` shows them. docs/loadtest.md defines each figure.
"""
