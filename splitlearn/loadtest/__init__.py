"""Load test: many clients at once, of a trunk server or of any server of the OpenAI protocol.

`plan` has the requests (of `lengths`, `texts`, a `trace`), `arrivals` when each begins, `clients` what answers them.
`trunk_clients` are real split clients in processes of their own, or threads that replay recorded hidden states;
`url_clients` ask an `endpoint`. `driver` runs them, `summary` computes the figures, goodput among them, and `report`
shows them. docs/loadtest.md defines each figure.
"""
