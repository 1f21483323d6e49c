"""The look of the flags table."""

CSS = """
.sl-flag-table .sl-table { font-size: .8rem; }
.sl-flag-table .sl-table :is(th, td) { padding: 3px 5px; }
.sl-flag-table .sl-table thead th { vertical-align: bottom; font-weight: 600; }
.sl-flag-table .sl-table tbody th { min-width: 9.5rem; overflow-wrap: break-word; }
.sl-flag-table thead th:nth-last-child(-n+5) [role=tooltip] { left: auto; right: 0; } /* in the box */
.sl-figure, .sl-ratio, .sl-ratio small { display: block; text-align: right; white-space: nowrap; }
.sl-flag-table th:first-child { position: sticky; left: 0; z-index: 1; background: var(--sl-panel); }
@media (max-width: 640px) { /* the names leave room for the figures */
  .sl-flag-table .sl-table th:first-child { min-width: 6rem; max-width: 7rem; white-space: normal;
    overflow-wrap: anywhere; }
}
.sl-flag-table .sl-row-all, .sl-flag-table .sl-row-none { font-weight: 700; }
.sl-interval { display: block; width: 72px; height: 14px; }
.sl-interval .sl-one { stroke: var(--body-text-color-subdued); stroke-dasharray: 2 2; }
.sl-interval .sl-range { stroke-width: 2; }
.sl-of-full circle { fill: var(--sl-full); } .sl-of-full .sl-range { stroke: var(--sl-full); }
.sl-of-split circle { fill: var(--sl-split); } .sl-of-split .sl-range { stroke: var(--sl-split); }
"""
