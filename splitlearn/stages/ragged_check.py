"""Whether the sessions of a stage can share a forward: its layers are asked, not its family's name."""

from collections.abc import Sequence

import torch

from splitlearn.models.cut import CutModel
from splitlearn.stages.ragged_batch import Packed, forward_packed
from splitlearn.stages.settings import SessionSettings
from splitlearn.stages.verify import SessionStep, reason_against


def agrees(cut: CutModel, settings: SessionSettings) -> bool:
    """Whether the layers give in one packed forward what they give apart, but for rounding.

    A family whose attention does not go through transformers' interface, or that does more with keys and values than
    keep them, shows it here. A compiled stage would be compiled anew for each mix of sessions.
    """
    arguments = settings.forward_arguments

    def together(steps: Sequence[SessionStep]) -> Sequence[torch.Tensor]:
        parts = [Packed(each.cache, each.position, each.x.shape[1], logits=each.x.shape[1]) for each in steps]
        return forward_packed(cut, torch.cat([each.x for each in steps], dim=1), parts, arguments)

    return not cut.compiled and reason_against(cut, together, arguments=arguments) is None
