"""Colours and spacing. Text and buttons pass WCAG AA in light and dark, which Gradio's own theme does not."""

import gradio as gr

FONTS = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]  # what the machine has, in every weight

THEME = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONTS).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    input_placeholder_color="*neutral_500",
)

CSS = """
.gradio-container > main { max-width: 1240px !important; margin: 0 auto !important; padding: 12px !important; }
.gradio-container .html-container { padding: 0; }
:is(#error, #flags-error):not(:has(.sl-error)), #share-link:not(:has(.sl-note)), #result:not(:has(section)),
#startup:not(:has(.sl-note, .sl-error)), #split-facts:not(:has(p)) {
  display: none; }
.sl-title h1 { font-size: 1.35rem; margin: 0; }
.sl-facts, .sl-small { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; overflow-wrap: anywhere; }
.sl-card, .sl-result { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px;
  background: var(--block-background-fill); color: var(--body-text-color); }
.sl-full { border-top: 3px solid #0072b2; }
.sl-split { border-top: 3px solid #009e73; }
.sl-card header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; }
.sl-card h3 { margin: 0; font-size: 1.05rem; }
.sl-what, .sl-state { color: var(--body-text-color-subdued); font-size: .85rem; }
.sl-state { margin-left: auto; }
.sl-busy { height: 3px; margin-top: 6px; border-radius: 2px; background: linear-gradient(90deg, transparent,
  var(--primary-500), transparent) 0 0 / 40% 100% no-repeat; animation: sl-busy 1.4s linear infinite; }
.sl-busy[hidden] { display: block; visibility: hidden; } /* keeps its place, so that nothing jumps */
@keyframes sl-busy { from { background-position: -70% 0; } to { background-position: 170% 0; } }
@media (prefers-reduced-motion: reduce) { .sl-busy { animation: none; background-position: 50% 0; } }
.sl-tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(92px, 1fr)); gap: 6px; margin: 8px 0; }
.sl-tiles > div { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 5px 6px; }
.sl-tiles dt { color: var(--body-text-color-subdued); font-size: .72rem; }
.sl-card .sl-tiles dt { white-space: nowrap; }
.sl-tiles dd { margin: 0; white-space: nowrap; font-size: 1.05rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.sl-result .sl-tiles, .sl-server .sl-tiles { grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); }
/* Reversed, the box stays scrolled to its end while text comes in. */
.sl-answer { display: flex; flex-direction: column-reverse; justify-content: flex-end; min-height: 7rem;
  max-height: 22rem; overflow-y: auto; }
.sl-prompt { margin-top: .5rem; font-size: .85rem; }
.sl-seen { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; margin-top: .5rem; }
.sl-answer > div { white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: auto; line-height: 1.5; }
.sl-error { border: 1px solid #b91c1c; border-left-width: 5px; border-radius: 6px; padding: 8px 12px;
  background: #fef2f2; color: #7f1d1d; overflow-wrap: anywhere; }
.dark .sl-error { background: #450a0a; color: #fecaca; border-color: #f87171; }
.sl-note { border: 1px solid var(--border-color-primary); border-left: 5px solid var(--primary-500);
  border-radius: 6px; padding: 8px 12px; overflow-wrap: anywhere; }
.sl-verdict { margin: 0; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.sl-same { color: #166534; } .dark .sl-same { color: #86efac; }
.sl-differ { color: #9a3412; } .dark .sl-differ { color: #fdba74; }
.sl-scroll { overflow-x: auto; margin: 8px 0; }
.sl-table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
.sl-table th, .sl-table td { border: 1px solid var(--border-color-primary); padding: 4px 8px; text-align: left;
  color: var(--body-text-color); }
.sl-table thead th { background: var(--background-fill-secondary); }
.sl-table tbody th { font-weight: 500; }
.sl-measured .sl-table td, .sl-measured .sl-table th { white-space: nowrap; }
.sl-off { color: var(--body-text-color-subdued); }
.sl-on { color: #166534; } .dark .sl-on { color: #86efac; }
.sl-badge { display: inline-block; border: 1px solid var(--border-color-primary); border-radius: 4px;
  padding: 0 5px; margin: 0 3px 0 0; font-size: .72rem; color: var(--body-text-color); }
.sl-rounding { border-color: #b45309; } .sl-exact { border-color: #15803d; } .sl-lossy { border-color: #b91c1c; }
#folded { flex-wrap: wrap; align-items: flex-start; }
#folded > * { min-width: min(100%, 320px) !important; }
#folded > *:has(> button.open) { flex-basis: 100%; }
.gradio-container button[role=tab][aria-selected=true] { color: var(--primary-600); }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300); }
.gradio-container label:has(input:disabled) { opacity: .6; }
.sl-swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
.sl-flags { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 8px; }
.sl-flag { gap: 2px !important; }
.sl-progress { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; font-size: .9rem; }
.sl-progress progress { flex: 1 1 240px; height: 12px; appearance: none; border: 0;
  border-radius: 6px; overflow: hidden; background: var(--border-color-primary); }
.sl-progress progress::-webkit-progress-bar { background: var(--border-color-primary); }
.sl-progress progress::-webkit-progress-value { background: var(--primary-600); }
.sl-progress progress::-moz-progress-bar { background: var(--primary-600); }
.sl-report h3 { font-size: 1.05rem; margin: 14px 0 2px; } .sl-report p { margin: 2px 0; }
.sl-report pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; padding: 8px; border-radius: 6px;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color); max-height: 22rem; overflow-y: auto; }
.sl-report details { margin: 8px 0; } .sl-report summary { cursor: pointer; font-weight: 600; }
.sl-cell-number { white-space: nowrap; text-align: right; } .sl-cell-long { min-width: 10rem; }
.sl-cell-faster { color: #166534; font-weight: 600; } .dark .sl-cell-faster { color: #86efac; }
.sl-cell-slower { color: #9a3412; font-weight: 600; } .dark .sl-cell-slower { color: #fdba74; }
.sl-cell-FAILED { color: #b91c1c; font-weight: 700; } .dark .sl-cell-FAILED { color: #fca5a5; }
.sl-key { display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 0; margin: 4px 0; list-style: none;
  font-size: .85rem; }
.sl-beside { overflow-x: auto; }
.js-plotly-plot text { fill: var(--body-text-color) !important; }
footer { display: none !important; }
"""
