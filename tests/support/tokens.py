"""Files of bearer tokens."""

from pathlib import Path

import yaml

from splitlearn.access import tokens as token_file

ANN, BOB = "secret-of-ann", "secret-of-bob"


def entry(name: str, held: str, **changes: object) -> dict[str, object]:
    """An entry for the token `held`."""
    right = {"name": name, "sha256": token_file.digest(held), "sessions": 2, "tokens_per_second": 1000.0}
    return {**right, **changes}


def written(folder: Path, *entries: object) -> Path:
    path = folder / "tokens.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path
