"""Rows that are never trained on: the first ones of each stream's validation shards, always in the same order."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np

from openmoe.pipelines import local_cache, passes, shards
from openmoe.pipelines import manifest as manifests
from openmoe.pipelines.config import DataError
from openmoe.pipelines.storage import StorageDenied

NO_KIND = -1  # of slots that count for nothing


class HeldOut(NamedTuple):
    """Rows to evaluate on, stream after stream."""

    streams: tuple[str, ...]  # names
    stream: np.ndarray  # int64[n], of each row
    records: tuple[bytes, ...]  # as shards hold them
    seq_len: int


def read(manifest_path: str, rows: int, *, cache_bytes: int = local_cache.DEFAULT_BYTES) -> HeldOut:
    """Reads the first rows of what was kept apart for each stream of a build, and packs what nobody has packed.

    Args:
      manifest_path: of a manifest, local or gs://.
      rows: of each stream; a stream that holds fewer gives what it has.
      cache_bytes: as of a Loader, whose folder it shares.

    Raises:
      DataError: of a source nothing was kept apart, or no row's worth.
    """
    manifest = manifests.load(manifest_path)
    records: list[bytes] = []
    stream_of: list[int] = []
    for stream in range(len(manifest.streams)):
        if not (found := _first(manifest, stream, rows, cache_bytes)):
            raise DataError(
                f"{manifest_path}: what was kept apart of {manifest.stream_names[stream]} makes no row; "
                "raise validation_share"
            )
        records += found
        stream_of += [stream] * len(found)
    return HeldOut(tuple(manifest.stream_names), np.asarray(stream_of, np.int64), tuple(records), manifest.seq_len)


def _first(manifest: manifests.Manifest, stream: int, rows: int, cache_bytes: int) -> list[bytes]:
    """Returns the first rows of a stream's groups, as many as there are."""
    passes.check_validation(manifest, [stream])
    found: list[bytes] = []
    for group, packed in enumerate(passes.packed_validation(manifest, stream)):
        if len(found) == rows:
            break
        try:
            receipt = packed or passes.pack_validation(manifest, stream, group)
        except StorageDenied:  # prepared data that may only be read: this process packs it for itself
            content = passes.render_validation(manifest, stream, group).content
            found += shards.records(content)[: rows - len(found)]
            continue
        shard = shards.Shard(
            passes.validation_path(manifest, stream, group),
            sha256=receipt["sha256"],
            cache_dir=local_cache.default_folder(),
            cache_bytes=cache_bytes,
        )
        with contextlib.closing(shard):
            found += shard.read(list(range(min(rows - len(found), receipt["rows"]))))
    return found


def batch(held_out: HeldOut, first: int, num_rows: int) -> dict[str, np.ndarray]:
    """Returns num_rows rows from `first` on: what `shards.batch` gives, and the kind of noise of each slot.

    Beyond the last row it begins again with the first, so that routing groups are full of text; of those rows no slot
    has a kind or carries loss.

    Returns:
      The arrays of `shards.batch`, and `kinds`, int32[num_rows, seq], index into packing.KINDS or NO_KIND.
    """
    total = len(held_out.records)
    records = [held_out.records[row % total] for row in range(first, first + num_rows)]
    arrays = shards.batch(records, held_out.seq_len)
    kinds = np.full((num_rows, held_out.seq_len), NO_KIND, np.int32)
    for row, record in enumerate(records[: max(total - first, 0)]):
        _, segments = shards.decode(record)
        of_segment = segments["denoiser"][segments["inputs"] + segments["targets"] > 0].astype(np.int32)
        segment = arrays["segment_ids"][row]
        kinds[row, segment > 0] = of_segment[segment[segment > 0] - 1]
    arrays["loss_weights"][max(total - first, 0) :] = 0
    return {**arrays, "kinds": kinds}
