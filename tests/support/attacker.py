"""An attacker's program: `main([capture, folder, attack...])` prints what each attack recovers, as JSON.

It is given the file of a capture and the folder of the public checkpoint, and nothing else.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from splitlearn.checkpoints.folder import open_folder
from splitlearn.privacy.capture import Capture
from splitlearn.privacy.checkpoint import Checkpoint
from splitlearn.privacy.registry import ATTACKS

FEW = 16
"""Sequences to train a tiny model's inverter with, in a second."""


def main(arguments: Sequence[str]) -> int:
    """Run the attacks."""
    path, folder, *names = arguments
    capture = Capture.load(Path(path))
    whole = Checkpoint.of(capture, open_folder(Path(folder), "the model"))
    checkpoint = replace(whole, network_windows=FEW)
    print(json.dumps({name: ATTACKS[name].run(capture, checkpoint) for name in names}))
    return 0
