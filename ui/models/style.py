"""The look of the list of models."""

CSS = """
#models-list :is(th, td):nth-child(2), #models-list :is(th, td):nth-child(3), #models-list td:nth-child(5) {
  white-space: nowrap; }
#models-list :is(th, td):nth-child(4) { min-width: 12rem; }
#models-list td { overflow-wrap: anywhere; }
#models-choice label { max-width: 100%; overflow-wrap: anywhere; }
"""
