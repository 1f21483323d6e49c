"""What the page refuses before Gradio sees it."""
