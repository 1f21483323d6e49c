"""The look of the tab "What the server reads"."""

CSS = """
.sl-reading { margin: 12px 0; }
.gradio-container .html-container .sl-reading h3 { margin: 0; }
.sl-reading .sl-tiles { grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); }
.sl-tokens { margin: 6px 0; line-height: 1.9; overflow-wrap: anywhere; white-space: pre-wrap; }
.sl-right { border-bottom: 2px solid #15803d; margin-right: 2px; } .dark .sl-right { border-color: #4ade80; }
.sl-wrong { border: 1px dashed #b91c1c; border-radius: 3px; padding: 0 2px; background: #fef2f2; color: #7f1d1d; }
.dark .sl-wrong { background: #450a0a; color: #fecaca; border-color: #f87171; }
.sl-wrong b { font-weight: 600; }
#attacks-status:not(:has(.sl-progress)), #attacks-error:not(:has(.sl-error)), #attacks-beside:not(:has(p)),
#sweep-progress:not(:has(.sl-progress)), #sweep-error:not(:has(.sl-error)) { display: none; }
"""
