"""The only place of a sequence's length: its token ids, and how many of them the stages have computed."""

from dataclasses import dataclass


@dataclass
class Sequence:
    """One sample's token ids, beginning with the prompt. The stages have computed the first `computed` of them.

    Each step gives the sessions its position, and they truncate their caches to it. So wrong drafts need no undo here.
    """

    ids: list[int]
    computed: int = 0

    @property
    def new(self) -> list[int]:
        """The ids that the stages have not computed yet."""
        return self.ids[self.computed :]

    def __len__(self) -> int:
        return len(self.ids)
