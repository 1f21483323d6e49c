"""Refuses requests that no page sends, before Gradio sees them."""
