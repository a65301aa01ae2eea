"""Where this machine keeps what is not part of any run: the controller's database and the state of local clusters."""

import os
from pathlib import Path


def home() -> Path:
    """Returns `$OPENMOE_HOME`, else `~/.openmoe`; created on first use, readable by its owner alone.

    Raises:
      StorageError: it cannot be made.
    """
    path = Path(os.environ.get("OPENMOE_HOME") or Path.home() / ".openmoe").absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        from openmoe.pipelines.storage import StorageError

        remedy = "set OPENMOE_HOME to a folder of yours"
        raise StorageError(
            f"{path}: cannot be made, to keep jobs and clusters in ({error.strerror}); {remedy}"
        ) from error
    return path
