"""Where every thread of a process stands; of a worker that is ended as stuck it is kept in the run directory.

stacks/000001-00003.txt     incarnation, process
"""

from __future__ import annotations

import sys
import threading
import traceback

from openmoe.pipelines import storage
from openmoe.platform.run.run_dir import RunDir

FOLDER = "stacks"
MOST_CHARACTERS = 250_000  # a few hundred threads, each some dozen calls deep
KEEP_TIMEOUT_S = 10.0


def of_all_threads() -> str:
    """Returns where every thread of this process stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def keep(run: RunDir, incarnation: int, process: int) -> None:
    """Writes them into the run directory; gives up after a while, since it may be the storage that is stuck."""
    text = of_all_threads()
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}\n... {len(text) - MOST_CHARACTERS:,} characters more are left out\n"
    path = run.at(FOLDER, f"{incarnation:06d}-{process:05d}.txt")
    writing = threading.Thread(target=storage.write_durable, args=(path, text.encode()), daemon=True)
    writing.start()
    writing.join(KEEP_TIMEOUT_S)


def kept(run: RunDir, incarnation: int) -> list[str]:
    """Returns the files that processes of an incarnation left, relative to the run directory."""
    names = storage.list_files(run.at(FOLDER))
    return [f"{FOLDER}/{name}" for name in names if name.startswith(f"{incarnation:06d}-")]
