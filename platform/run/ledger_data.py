"""What the shards say that a step consumed, to compare the ledger with; NumPy alone, no devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from openmoe.model import checksum
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.loader import Loader
from openmoe.platform.run.ledger import Entry, Mismatch
from openmoe.platform.run.run_dir import RunDir

READ_ROWS = 256  # at a time, as long as one step follows the other: single batches of few rows cost three times as much
HINT_STEPS = 64  # before and after a step, among whose rows it is sought what the step consumed instead


def manifest_of(run: RunDir, data_id: str, data_dir: str | None = None) -> str:
    """Returns the path of the build of the rows `data_id`; of several, that with the most rows.

    Args:
      run: that was trained on them.
      data_id: of its acceptances and incarnations.
      data_dir: where they are; None: as in the run file, but for data inside the run directory, which moves with it.

    Raises:
      DataError: there is none.
    """
    if data_dir is None:
        spec = run.record()["spec"]
        inside = spec["data_dir"] == storage.join(spec["run_dir"], "data")
        data_dir = run.at("data") if inside else spec["data_dir"]
    folder = storage.join(data_dir, "manifests")
    found = [manifests.load(storage.join(folder, name)) for name in storage.list_files(folder)]
    paths = [manifest.path for manifest in found if manifest.data_id == data_id]
    if not paths:
        raise DataError(f"{data_dir}: holds no build of the rows {data_id}; say with --data DIR where they are")
    return max(paths, key=lambda path: Loader(path).num_rows) if len(paths) > 1 else paths[0]


class Comparison:
    """Compares entries with the rows of a build; `report` is told how many it has compared."""

    def __init__(self, loader: Loader, report: Callable[[int], None] = lambda done: None) -> None:
        self._loader, self._report = loader, report
        self._done = self._next_row = self._first_row = 0
        self._read = np.zeros((0, len(checksum.SALTS)), np.uint32)  # hashes of the rows from _first_row on

    def __call__(self, entry: Entry) -> Mismatch | None:
        """Returns how the step's checksum differs from that of its rows, or None."""
        hashes = self._hashes_of(entry)
        expected = hashes.sum(axis=0, dtype=np.uint32)
        self._done += 1
        self._report(self._done)
        found = np.asarray(entry.checksum, np.uint32)
        if (found == expected).all():
            return None
        return Mismatch(_words(expected), _words(found), self._hint(entry, hashes, found - expected))

    def _hashes_of(self, entry: Entry) -> np.ndarray:
        if not self._first_row <= entry.lo < entry.hi <= self._first_row + len(self._read):
            ahead = entry.lo + READ_ROWS if entry.lo == self._next_row else 0
            self._first_row = entry.lo
            self._read = self._hashes(entry.lo, max(entry.hi, min(ahead, self._loader.num_rows)))
        self._next_row = entry.hi
        return self._read[entry.lo - self._first_row : entry.hi - self._first_row]

    def _hashes(self, lo: int, hi: int) -> np.ndarray:
        """Returns uint32[hi - lo, 2], the hashes of rows, which themselves may be too many for the memory."""
        parts = (self._loader.rows(start, min(start + READ_ROWS, hi)) for start in range(lo, hi, READ_ROWS))
        return np.concatenate([checksum.row_hashes(part) for part in parts])

    def _hint(self, entry: Entry, hashes: np.ndarray, difference: np.ndarray) -> str:
        """Says which rows the step consumed instead, if they are near: as many in a row, or one in another's place."""
        num_rows = entry.hi - entry.lo
        lo = max(0, entry.lo - HINT_STEPS * num_rows)
        near = self._hashes(lo, min(self._loader.num_rows, entry.hi + HINT_STEPS * num_rows))
        sums = np.cumsum(np.concatenate([np.zeros_like(near[:1]), near]), axis=0, dtype=np.uint32)
        wanted = np.asarray(entry.checksum, np.uint32)
        at = np.flatnonzero((sums[num_rows:] - sums[:-num_rows] == wanted).all(axis=1))
        if len(at):
            return f"to be what rows [{lo + at[0]}, {lo + at[0] + num_rows}) hold"
        replaced, by = np.nonzero((near[None] == (hashes + difference)[:, None]).all(axis=-1))
        if len(by):
            return f"to be what these rows hold with row {lo + by[0]} in the place of row {entry.lo + replaced[0]}"
        return ""


def _words(sums: np.ndarray) -> str:
    return f"checksum {sums.tolist()}"
