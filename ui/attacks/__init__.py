"""The tab "What the server reads": attacks on a visitor's own prompt, and recall against the depth of the cut."""
