"""Load on a trunk server: many clients at once, and what they got.

`plan` says which requests there are, `arrivals` when each begins, `clients` what answers them (real split clients in
processes of their own, or threads that replay recorded hidden states), `driver` runs them, `summary` says what came
out, goodput among it, and `report` shows it. docs/load.md says what each figure means.
"""
