"""What a model is made of, what a cut of it costs, and which cut to choose."""
