"""Example prompts, each with a hint on what it shows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """`look` is the hint on what this prompt shows."""

    label: str
    prompt: str
    look: str


EXAMPLES = (
    Example(
        "A question",
        "Explain in two sentences why the sky is blue.",
        "Short prompt: TTFT is small, and TPOT decides how long you wait.",
    ),
    Example(
        "A summary that quotes",
        "Quote the two most important sentences of this text, word for word:\n\nA language model is a stack of layers. "
        "Each layer reads the hidden states of the layer below and writes new ones. The first layers and the last ones "
        "can run on a phone. The layers between need most of the memory. A server can run them for many phones. "
        "The phone then sends one hidden state for each token and gets one back.",
        "Long prompt, quoted answer: try the flag prompt_lookup, which guesses tokens from the prompt.",
    ),
    Example(
        "A code edit",
        "Rename the variable x to total and return only the code:\n\ndef add(values):\n    x = 0\n"
        "    for value in values:\n        x = x + value\n    return x",
        "Most of the answer is in the prompt: more drafts are accepted than in a story.",
    ),
    Example(
        "A story",
        "Write a short story about a lighthouse keeper who finds a letter.",
        "Nothing to quote: few drafts are accepted. Raise Max new tokens to see TPOT grow with the context.",
    ),
    Example(
        "A question in Chinese",
        "\u7528\u4e00\u53e5\u8bdd\u89e3\u91ca\u4e3a\u4ec0\u4e48\u5929\u7a7a\u662f\u84dd\u8272\u7684\u3002",
        "A character may take several tokens: text appears in steps, and the counts are of tokens.",
    ),
)
