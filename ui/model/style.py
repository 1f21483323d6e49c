"""The look of the tab "Model and cut"."""

CSS = """
:root { --sl-client: #56b4e9; --sl-trunk: #009e73; }
.sl-parts svg { display: block; width: 100%; overflow: visible; font-size: 12px; font-variant-numeric: tabular-nums; }
.sl-parts svg text { fill: var(--body-text-color); }
.sl-parts .sl-client { fill: var(--sl-client); } .sl-parts .sl-trunk { fill: var(--sl-trunk); }
.sl-parts svg .sl-in { fill: #10202c; writing-mode: vertical-rl; font-size: 11px; pointer-events: none; }
.sl-parts .sl-cut line { stroke: var(--body-text-color); stroke-width: 2; stroke-dasharray: 5 3; }
.sl-parts .sl-cut circle { fill: var(--body-text-color); }
.sl-parts .sl-cut .sl-grip { fill: transparent; }
.sl-parts .sl-cut { cursor: ew-resize; touch-action: none; }
.sl-swatch.sl-client { background: var(--sl-client); } .sl-swatch.sl-trunk { background: var(--sl-trunk); }
#model-facts .sl-tiles { grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); }
.sl-advice p:not(.sl-small) { margin: 0 0 6px; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.sl-pareto > svg { display: block; width: 100%; height: 300px; overflow: visible; font-size: 12px; }
.sl-pareto svg text { fill: var(--body-text-color); font-variant-numeric: tabular-nums; }
.sl-pareto svg line { stroke: var(--sl-line); }
.sl-pareto svg .sl-limit { stroke: #d55e00; stroke-width: 2; stroke-dasharray: 6 4; }
.sl-dot { fill: var(--sl-split); fill-opacity: .45; cursor: pointer; }
.sl-dot.sl-front { fill-opacity: 1; }
.sl-dot:focus-visible { outline: 3px solid var(--primary-500); outline-offset: 2px; }
.sl-sign { display: inline-block; vertical-align: -3px; }
.sl-whole { fill: var(--sl-full); }
.sl-ring { fill: none; stroke: var(--body-text-color); stroke-width: 2; pointer-events: none; }
.sl-ring.sl-now { stroke-dasharray: 3 2; }
.sl-mark { fill: none; stroke: #d55e00; stroke-width: 2; pointer-events: none; }
#model-status:not(:has(.sl-progress)):not(:has(.sl-note)), #model-error:not(:has(.sl-error)),
#model-facts:not(:has(.sl-tiles)):not(:has(.sl-note)) { display: none; }
#model-yaml textarea { font-family: ui-monospace, monospace; }
"""
