"""The look of the page: type scale, spacing, colours.

Text and buttons pass WCAG AA in light and dark, control borders 3:1, which Gradio's own theme does not."""

import gradio as gr

from ui.attacks import style as attacks_style
from ui.chat import style as chat_style
from ui.flag_table import style as flag_table_style
from ui.history import style as history_style
from ui.model import style as model_style
from ui.models import style as models_style

FONTS = ["system-ui", "Segoe UI", "Roboto", "sans-serif"]  # what the machine has, in every weight
BORDER, BORDER_DARK = "#7c8798", "#7f8ca1"  # of controls: 3:1 to what is around them

THEME = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONTS).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
    block_border_width="0px",
    block_background_fill="transparent",
    block_background_fill_dark="transparent",
    block_padding="0px",
    block_shadow="none",
    input_border_color=BORDER,
    input_border_color_dark=BORDER_DARK,
    checkbox_border_color=BORDER,
    checkbox_border_color_dark=BORDER_DARK,
    checkbox_label_border_color=BORDER,
    checkbox_label_border_color_dark=BORDER_DARK,
    button_secondary_border_color=BORDER,
    button_secondary_border_color_dark=BORDER_DARK,
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_700",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    input_placeholder_color="*neutral_500",
)

# Gradio puts its own prefix behind every comma: a list inside :has() would look for that prefix below the element.
PAGE = """
:root { --sl-full: #0072b2; --sl-split: #009e73; --sl-gap: 12px; --sl-line: #d7dee8; --sl-panel: #f8fafc;
  --sl-hover: #eef2f7; }
.dark { --sl-full: #56b4e9; --sl-split: #2dd4a7; --sl-line: #3b4a60; --sl-panel: #172033; --sl-hover: #1f2b42; }
.gradio-container main { width: 100%; max-width: 1240px !important; margin: 0 auto !important;
  padding: 16px !important; }
@media (max-width: 640px) { .gradio-container .fillable { padding-inline: 0 !important; } }
.gradio-container .html-container { padding: 0; }
:is(#error, #flags-error, #lab-error, #link-error, #models-error):not(:has(.sl-error)),
#share-link:not(:has(.sl-note)), #watch:not(:has(p)), #models-note:not(:has(.sl-note)), #time:not(:has(section)),
#startup:not(:has(.sl-note)):not(:has(.sl-error)), #split-facts:not(:has(p)) {
  display: none; }
.gradio-container :focus-visible { outline: 2px solid var(--primary-500) !important; outline-offset: 2px; }
.sl-title h1 { font-size: 1.9rem; font-weight: 750; letter-spacing: -.03em; margin: 0; }
.gradio-container .wrap:has(> .wrap-inner) { border-color: var(--input-border-color); }
#language { text-align: right; font-size: .85rem; }
.nav-holder { display: none !important; } /* Gradio's menu of pages: the languages have links of their own */
.gradio-container .form { background: transparent; border: 0; gap: var(--sl-gap); }
.gradio-container .html-container h2 { font-size: 1.3rem; font-weight: 700; letter-spacing: -.01em; margin: 0; }
.gradio-container .html-container h3 { font-size: 1rem; font-weight: 650; margin: 16px 0 6px; }
.sl-facts, .sl-small { color: var(--body-text-color-subdued); font-size: .85rem; margin: 0; overflow-wrap: anywhere; }
.sl-purpose { max-width: 75ch; margin: 0 0 10px; }
.sl-link { all: unset; cursor: pointer; text-decoration: underline; color: var(--link-text-color); }
.sl-ways { display: grid; gap: 6px; font-size: .85rem; }
.sl-way { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; }
.sl-way b { flex: 0 0 3rem; }
.sl-way i { color: var(--body-text-color-subdued); font-style: normal; font-size: .75rem; }
.sl-way i::after { content: " \\2192"; }
.sl-box { border: 2px solid var(--sl-full); border-radius: 6px; padding: 3px 10px; }
.sl-way-full .sl-box { flex: 1 1 220px; } .sl-way-split .sl-box { border-color: var(--sl-split); flex: 1 1 150px; }
.sl-way-split .sl-far { border-style: dashed; flex-grow: 3; }
.sl-status { min-height: 1.4em; margin: 0; font-size: .9rem; color: var(--body-text-color-subdued); }
.sl-examples { flex-wrap: wrap; gap: 6px; }
.sl-examples button { border: 1px solid var(--sl-line); flex: 0 0 auto; white-space: nowrap; width: auto; }
#actions { align-items: center; } #actions > button { align-self: center; min-height: 44px; }
.sl-card, .sl-result, .sl-time { border: 1px solid var(--sl-line); border-radius: 10px; padding: 14px;
  background: var(--sl-panel); color: var(--body-text-color); }
.sl-full { border-top: 4px solid var(--sl-full); }
.sl-split { border-top: 4px solid var(--sl-split); }
.sl-result { min-height: 3.5rem; scroll-margin-top: 8px; }
.sl-card header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; }
.sl-what, .sl-state { color: var(--body-text-color-subdued); font-size: .85rem; }
.sl-state { margin-left: auto; }
@property --sl-seconds { syntax: "<integer>"; inherits: false; initial-value: 0; }
.sl-clock { animation: sl-clock 3600s steps(3600) forwards; counter-reset: seconds var(--sl-seconds); }
.sl-clock::after { content: ", " counter(seconds) " s"; }
@keyframes sl-clock { to { --sl-seconds: 3600; } }
/* It moves by transform: of any other property each frame is styled and painted anew, which takes 0.05 of a core. */
.sl-busy { height: 3px; margin-top: 6px; border-radius: 2px; overflow: hidden; }
.sl-busy::before { content: ""; display: block; width: 40%; height: 100%; animation: sl-busy 1.4s linear infinite;
  background: linear-gradient(90deg, transparent, var(--primary-500), transparent); }
.sl-busy[hidden] { display: block; visibility: hidden; } /* keeps its place, so that nothing jumps */
.sl-busy[hidden]::before { animation: none; }
@keyframes sl-busy { from { transform: translateX(-100%); } to { transform: translateX(250%); } }
@media (prefers-reduced-motion: reduce) { .sl-busy::before { animation: none; transform: translateX(75%); } }
.sl-tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(92px, 1fr)); gap: 8px; margin: 8px 0; }
.sl-tiles dt { color: var(--body-text-color-subdued); font-size: .75rem; }
.sl-tiles dd { margin: 0; font-size: 1.15rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.sl-tiles dd small { font-weight: 400; font-size: .75rem; color: var(--body-text-color-subdued); }
.sl-card .sl-tiles { grid-template-columns: repeat(auto-fit, minmax(82px, 1fr)); }
.sl-card .sl-tiles dd { white-space: nowrap; }
#cards .html-container, #cards .prose, .sl-card { height: 100%; box-sizing: border-box; }
.sl-hero { grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); }
.sl-hero .sl-big dd { font-size: 2.6rem; font-weight: 700; letter-spacing: -.02em; line-height: 1.1; }
.sl-hero .sl-big small { display: block; line-height: 1.4; letter-spacing: 0; }
.sl-server .sl-tiles { grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); }
.sl-why { margin: 4px 0; } .sl-doubt { font-weight: 600; }
.sl-term { position: relative; }
.sl-term button { all: unset; cursor: help; border-bottom: 1px dotted currentColor; }
.sl-term button:focus-visible { outline: 2px solid var(--primary-500); outline-offset: 2px; }
.sl-term [role=tooltip] { position: absolute; left: 0; top: 1.5em; z-index: 20; width: max-content;
  max-width: min(260px, 70vw); padding: 6px 8px; border-radius: 6px; border: 1px solid var(--sl-line);
  background: var(--body-background-fill); color: var(--body-text-color); font-size: .8rem; font-weight: 400;
  line-height: 1.35; white-space: normal; visibility: hidden; }
.sl-term:hover [role=tooltip], .sl-term button:focus + [role=tooltip] { visibility: visible; }
@media (max-width: 640px) { /* at the screen's foot, where it cannot be cut off */
  .sl-term [role=tooltip] { position: fixed; left: 12px; right: 12px; top: auto; bottom: 12px; width: auto;
    max-width: none; }
}
/* Reversed, the box stays scrolled to its end while text comes in. */
.sl-answer { display: flex; flex-direction: column-reverse; min-height: 7rem; max-height: 22rem; overflow-y: auto; }
mark { background: #fde68a; color: #1e293b; border-radius: 3px; }
.sl-prompt { margin-top: .5rem; font-size: .85rem; }
.sl-seen { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem; overflow-y: auto; margin-top: .5rem; }
.sl-answer > div { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.gradio-container .prose .sl-answer > div { margin-bottom: auto !important; } /* a short text begins at the top */
.sl-waterfall td { width: 42%; white-space: nowrap; } .sl-waterfall tbody tr:last-child { font-weight: 700; }
.sl-waterfall .sl-table th, .sl-waterfall .sl-table td { padding-block: 3px; }
.sl-part { display: grid; grid-template-columns: minmax(0, 1fr) 5rem; align-items: center; gap: 8px; }
.sl-part > :last-child { text-align: right; }
@media (max-width: 640px) { /* the number below its bar */
  .sl-waterfall .sl-part { grid-template-columns: minmax(0, 1fr); gap: 2px; }
  .sl-part > :last-child { text-align: left; } .sl-hero .sl-big dd { font-size: 2rem; }
}
.sl-bar { display: block; height: 14px; border-radius: 3px; min-width: 2px; }
.sl-answer-time { display: block; width: 100%; height: 88px; }
.sl-error { border: 1px solid #b91c1c; border-left-width: 5px; border-radius: 6px; padding: 8px 12px;
  background: #fef2f2; color: #7f1d1d; overflow-wrap: anywhere; }
.dark .sl-error { background: #450a0a; color: #fecaca; border-color: #f87171; }
.sl-note { border: 1px solid var(--sl-line); border-left: 5px solid var(--primary-500);
  border-radius: 6px; padding: 8px 12px; overflow-wrap: anywhere; }
.sl-verdict { margin: 0; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.sl-same { color: #166534; } .dark .sl-same { color: #86efac; }
.sl-differ { color: #9a3412; } .dark .sl-differ { color: #fdba74; }
.sl-scroll { overflow-x: auto; margin: 8px 0; contain: inline-size; } /* a wide table widens nothing around it */
.gradio-container .prose table.sl-table, .gradio-container .sl-table tr { border: 0; }
.sl-table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
.sl-table th, .sl-table td { border: 0; border-bottom: 1px solid var(--sl-line); padding: 6px 10px; text-align: left;
  color: var(--body-text-color); }
.sl-table thead th { border-bottom-width: 2px; color: var(--body-text-color-subdued); font-size: .78rem; }
.sl-table tbody tr:hover > * { background: var(--sl-hover); }
.sl-table tbody th { font-weight: 500; }
.sl-measured .sl-table td, .sl-measured .sl-table th { white-space: nowrap; }
.sl-off { color: var(--body-text-color-subdued); }
.sl-on { color: #166534; } .dark .sl-on { color: #86efac; }
.sl-badge { display: inline-block; border: 1px solid var(--sl-line); border-radius: 4px;
  padding: 0 5px; margin: 0 3px 0 0; font-size: .72rem; color: var(--body-text-color); }
.sl-rounding { border-color: #b45309; } .sl-exact { border-color: #15803d; } .sl-lossy { border-color: #b91c1c; }
#folded { flex-wrap: wrap; align-items: flex-start; }
#folded > * { min-width: min(100%, 320px) !important; border: 1px solid var(--sl-line); border-radius: 8px;
  padding: 8px 12px; }
#folded > *:has(> button.open) { flex-basis: 100%; }
.gradio-container button[role=tab][aria-selected=true] { color: var(--primary-600); }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300); }
.gradio-container label:has(input:disabled) { opacity: .6; }
.sl-swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px; }
.sl-flags { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
  gap: 8px; }
.sl-flag { gap: 2px !important; } .sl-flag.sl-cannot { display: none !important; }
#flags-cannot p { display: block; font-weight: 400; }
#flags-cannot ul { list-style: none; padding: 0; display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.sl-progress { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; font-size: .9rem; }
.sl-progress progress { flex: 1 1 240px; height: 12px; appearance: none; border: 0;
  border-radius: 6px; overflow: hidden; background: var(--sl-line); }
.sl-progress progress::-webkit-progress-bar { background: var(--sl-line); }
.sl-progress progress::-webkit-progress-value { background: var(--primary-600); }
.sl-progress progress::-moz-progress-bar { background: var(--primary-600); }
.sl-report p { margin: 2px 0; }
.gradio-container .sl-report h2:not(:first-child) { margin-top: 16px; }
.sl-report pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; padding: 8px; border-radius: 6px;
  border: 1px solid var(--sl-line); color: var(--body-text-color); max-height: 22rem; overflow-y: auto; }
.gradio-container details { margin: 8px 0; } .gradio-container summary { cursor: pointer; font-weight: 600; }
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
STYLES = (model_style, models_style, flag_table_style, history_style, chat_style, attacks_style)
CSS = PAGE + "".join(style.CSS for style in STYLES)
