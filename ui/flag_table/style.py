"""The look of the flags table."""

CSS = """
.sl-flag-table .sl-table { white-space: nowrap; }
.sl-flag-table th:first-child { position: sticky; left: 0; z-index: 1; background: var(--sl-panel); }
.sl-flag-table .sl-row-all th, .sl-flag-table .sl-row-none th { font-weight: 700; }
.sl-flag-table .sl-full-column { border-left: 3px solid var(--sl-full) !important; }
.sl-flag-table .sl-split-column { border-left: 3px solid var(--sl-split) !important; }
.sl-interval { display: block; width: 120px; height: 14px; }
.sl-interval .sl-one { stroke: var(--body-text-color-subdued); stroke-dasharray: 2 2; }
.sl-interval .sl-range { stroke-width: 2; }
.sl-of-full circle { fill: var(--sl-full); } .sl-of-full .sl-range { stroke: var(--sl-full); }
.sl-of-split circle { fill: var(--sl-split); } .sl-of-split .sl-range { stroke: var(--sl-split); }
"""
