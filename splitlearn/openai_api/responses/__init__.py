"""/v1/responses: `request.py` has what can be asked, `writer.py` the response and the typed events of its stream."""
