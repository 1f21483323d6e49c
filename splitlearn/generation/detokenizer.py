"""Incremental decoding of token ids to text."""

from collections.abc import Callable, Mapping, Sequence

Decode = Callable[[Sequence[int]], str]
_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, and a byte is at most one token. So at most three replacement characters at
# the end can still become a character.
_UNFINISHED = 3
# Ids that are decoded again with each new one: so many that the text at the window's end does not depend on its start.
_WINDOW = 16


class Detokenizer:
    """Decodes one answer id by id. All pieces together equal `Tokens.decode` of all ids.

    Each id decodes at most 32 ids again. A character is returned once all its bytes are there. A replacement character
    is held back until no byte can complete it; then it is part of the text. (While text ends in one, tokenizers'
    DecodeStream holds back and decodes all of it again. It also cannot return the rest at the end.)

    One difference remains for tokenizers that have tokens for single bytes (SentencePiece's byte fallback). A stray
    byte after a whole character changes that character, in `Tokens.decode` only, to replacement characters.
    """

    def __init__(self, decode: Decode, special: Mapping[int, str]) -> None:
        self._decode = decode
        self._special = special
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were returned already, or belong to earlier ids

    def feed(self, token: int) -> str:
        """The text that `token` completes. Empty for an unfinished character and for most special tokens."""
        if token in self._special:
            return self._special[token]
        self._window.append(token)
        text = self._decode(self._window)
        unfinished = len(text) - len(text.rstrip(_REPLACEMENT))
        piece = text[self._given : len(text) - min(unfinished, _UNFINISHED)]
        self._given += len(piece)
        if len(self._window) > 2 * _WINDOW:
            self._shrink(len(text) - self._given)
        return piece

    def flush(self) -> str:
        """The rest at the end: the text that was held back as an unfinished character."""
        return self._decode(self._window)[self._given :]

    def _shrink(self, held_back: int) -> None:
        """Drop the older ids. Text that is held back stays at the end."""
        self._window = self._window[-_WINDOW:]
        self._given = len(self._decode(self._window)) - held_back
