"""The look of the history and of two pinned comparisons."""

CSS = """
.sl-history .sl-table td { white-space: nowrap; }
.sl-history .sl-table td:nth-of-type(-n+2) { white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
.sl-history .sl-table th { white-space: nowrap; }
.sl-pinned .sl-table td { overflow-wrap: anywhere; }
.sl-two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 12px; }
.sl-two mark { outline: 2px solid #d55e00; }
.sl-pinned pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; padding: 8px; border-radius: 6px;
  border: 1px solid var(--sl-line); }
#command textarea { font-family: ui-monospace, monospace; }
"""
