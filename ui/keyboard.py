"""A script that adds keyboard and screen-reader support to Gradio's tabs and accordions. It runs once a page.

Arrow keys, Home and End move between tabs, and Tab stops once at the tabs (ARIA Authoring Practices, "Tabs"). An
accordion's button says whether it is open (`aria-expanded`). Gradio runs the script as it runs its own.
"""

KEYBOARD = """() => {
  const set = (element, name, value) => {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  };
  const mark = () => {
    for (const fold of document.querySelectorAll('button.label-wrap'))
      set(fold, 'aria-expanded', String(fold.classList.contains('open')));
    for (const tab of document.querySelectorAll('[role=tab]'))
      set(tab, 'tabindex', tab.getAttribute('aria-selected') === 'true' ? '0' : '-1');
  };
  document.addEventListener('keydown', event => {
    const tab = event.target.closest('[role=tab]');
    if (!tab || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const all = [...tab.closest('[role=tablist]').querySelectorAll('[role=tab]:not(:disabled)')];
    const at = all.indexOf(tab), last = all.length - 1;
    const to = {ArrowRight: at < last ? at + 1 : 0, ArrowLeft: at ? at - 1 : last, Home: 0, End: last}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    all[to].focus();
    all[to].click();
  });
  const watched = {subtree: true, childList: true, attributeFilter: ['class', 'aria-selected']};
  new MutationObserver(mark).observe(document.body, watched);
  mark();
}"""
