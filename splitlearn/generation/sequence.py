"""The one place of a sequence's length: its token ids, and how many of them the stages have computed."""

from dataclasses import dataclass


@dataclass
class Sequence:
    """One sample's token ids, the prompt's first. The stages have the first `computed` of them.

    A session is told with each step at which position it begins, and truncates its cache to there: what was fed on
    trial and did not come true is never undone here.
    """

    ids: list[int]
    computed: int = 0

    @property
    def new(self) -> list[int]:
        """The ids that the stages do not have yet."""
        return self.ids[self.computed :]

    def __len__(self) -> int:
        return len(self.ids)
