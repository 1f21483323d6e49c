"""The structure of a transformers model, how it is cut, and the test that a cut is exact."""
