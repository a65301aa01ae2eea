"""Where this machine keeps what is not part of any run: the controller's database and the state of local clusters."""

import os
from pathlib import Path


def home() -> Path:
    """Returns `$OPENMOE_HOME`, else `~/.openmoe`; created on first use, readable by its owner alone."""
    path = Path(os.environ.get("OPENMOE_HOME") or Path.home() / ".openmoe").absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
