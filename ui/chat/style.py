"""The look of the Chat tab."""

CSS = """
/* Reversed, it stays scrolled to its end while text comes in. */
#chat-box { flex-direction: column-reverse; flex-wrap: nowrap; overflow-y: auto; scroll-margin-top: 8px; }
#chat-box:has(.sl-turn) { height: min(62vh, 44rem); border-block: 1px solid var(--sl-line); padding-block: 8px; }
#chat-box:has(.sl-turn) #chat-empty { display: none; }
#chat-turns { flex: 0 0 auto; margin-bottom: auto; }
.sl-turn { padding-bottom: 14px; }
.sl-turn > header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; min-height: 32px; }
.gradio-container .html-container .sl-turn h2 { font-size: 1rem; }
.gradio-container .html-container .sl-turn h3 { margin: 0; }
.sl-turn-do { display: flex; flex-wrap: wrap; gap: 6px; }
.gradio-container .sl-turn-do button { margin: 0; min-height: 28px; padding: 0 10px; border-radius: 6px;
  border: 1px solid var(--input-border-color); background: var(--sl-panel); color: var(--body-text-color);
  font-size: .85rem; font-weight: 500; cursor: pointer; }
.sl-turn-do button:hover { background: var(--sl-hover); }
#chat:has(#chat-send:disabled) .sl-turn-do { visibility: hidden; } /* a turn runs: keeps its place */
.sl-said { white-space: pre-wrap; overflow-wrap: anywhere; width: fit-content; max-width: 100%; margin: 6px 0 10px;
  padding: 8px 12px; box-sizing: border-box; border-radius: 10px; border: 1px solid var(--sl-line);
  background: var(--sl-hover); color: var(--body-text-color); }
.sl-turn .sl-answer { max-height: none; min-height: 4rem; }
.sl-turn .sl-verdict { margin-top: 8px; min-height: 1.5em; }
.sl-chosen { display: flex; flex-wrap: wrap; gap: 2px 14px; }
.sl-ids { display: flex; flex-wrap: wrap; gap: 4px; padding: 0; margin: 6px 0; list-style: none;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
.sl-ids li { display: flex; flex-direction: column; margin: 0; padding: 2px 6px; border: 1px solid var(--sl-line);
  border-radius: 4px; max-width: 100%; box-sizing: border-box; }
.sl-ids b { font-weight: 500; font-size: .75rem; color: var(--body-text-color-subdued); }
.sl-ids span { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat-error:not(:has(.sl-error)), #chat-watch:not(:has(p)), #chat-editing:not(:has(p)),
#chat-prompt:not(:has(section)) { display: none; }
"""
