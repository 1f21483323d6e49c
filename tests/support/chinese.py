"""What of a Chinese page is in English still."""

import re

from playwright.sync_api import Page

from splitlearn.checkpoints.catalogue import CATALOGUE
from splitlearn.flags.registry import FLAGS
from ui.attacks.actions import DEFENCES
from ui.flags.flag_words import NAMES

SENTENCE = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}){2,}")
GRADIOS = (
    "Box Select",
    "Lasso Select",
    "Download plot",
    "Copy",
    "Empty value",
)
"""Gradio and Plotly have no other language for these names of buttons and empty fields."""
CHOICES = {choice for flag in FLAGS.values() for choice in flag.choices}
TERMS = {*FLAGS, *NAMES, *CHOICES, *(flag.label for flag in FLAGS.values())}
TERMS |= {"English", "splitlearn", "gRPC", "Wi-Fi", "Top-k", "Top-p", "MLP", "RMSNorm", "LM head", "dtype"}
TERMS |= {"TTFT", "TPOT", "Delta", *DEFENCES}
TERMS |= {name for entry in CATALOGUE for name in (entry.name, entry.licence)}
NAME = re.compile(
    r"(?:hub|PyPI|npm|torch|transformers) \S+(?:, \S+)*"
    r"|[a-z0-9_]+=\w+|[\w./-]*/[\w./-]*|\w+\.(?:csv|html|json)|[-+±\d.,]+ \w{1,2}"
)
"""Names of flags with a choice, paths, files, figures with their unit; where a model comes from; versions."""
LATIN = re.compile("[A-Za-z]{3}")
CHINESE = re.compile("[\u4e00-\u9fff\uff00-\uffef]")
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (element && element.checkVisibility() && !element.closest('[dir=auto], pre, code, script, style, textarea'))
      found.push(walker.currentNode.textContent.trim());
  }
  for (const name of ['aria-label', 'title'])
    for (const element of document.querySelectorAll(`[${name}]`)) found.push(element.getAttribute(name));
  return found;
}"""


def english(page: Page) -> set[str]:
    """The texts with three English words in a row, and those of one or two that are no name and no term."""
    texts = {text for text in page.evaluate(TEXTS) if not text.startswith(GRADIOS)}
    words = {text for text in texts if LATIN.search(text) and not CHINESE.search(text)}
    names = {text for text in words if text.strip("()") in TERMS or NAME.fullmatch(text)}
    return {text for text in texts if SENTENCE.search(text)} | (words - names)
