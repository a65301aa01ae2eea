"""What a step consumed, as two sums: one function for the arrays on the devices and for those on the host.

It is written on operators that NumPy and JAX share, so the training step computes it inside its program, and whoever
checks the ledger computes it again with NumPy alone, where there are no devices. All arithmetic is that of uint32,
which wraps: the sums do not depend on the order of the rows, on the mesh, or on how a device adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# All that the model gets; in this order, for the sums depend on it.
KEYS = ("input_ids", "target_ids", "loss_weights", "segment_ids", "positions")
SALTS = (0x243F6A88, 0x85A308D3)  # of two hashes that have nothing to do with each other: digits of pi


def batch_checksum(batch: Mapping[str, Any]) -> Any:
    """Returns uint32[2], the wrapping sums of both hashes of every row: 64 bits.

    Args:
      batch: the arrays of KEYS, [..., rows, seq], of NumPy or JAX; ids int32, loss_weights float32.
    """
    hashes = row_hashes(batch)
    return hashes.reshape(-1, len(SALTS)).sum(axis=0, dtype=hashes.dtype)


def row_hashes(batch: Mapping[str, Any]) -> Any:
    """Returns uint32[..., rows, 2], two hashes of each row: of all its arrays, slot by slot."""
    xp = batch[KEYS[0]].__array_namespace__()
    return xp.stack([_row_hash(xp, batch, salt) for salt in SALTS], axis=-1)


def _row_hash(xp: Any, batch: Mapping[str, Any], salt: int) -> Any:
    """Returns uint32[..., rows]. Slots are hashed with their number, and rows once more, so that tokens that change
    places between slots or between rows change the sums.
    """
    slot = xp.arange(batch[KEYS[0]].shape[-1], dtype=xp.uint32)
    word = _mix(xp, slot ^ xp.uint32(salt))
    for key in KEYS:
        word = _mix(xp, word ^ _bits(xp, batch[key]))
    return _mix(xp, word.sum(axis=-1, dtype=xp.uint32))


def _bits(xp: Any, array: Any) -> Any:
    """Returns the bits of numbers as uint32; those of floats as float32."""
    if xp.issubdtype(array.dtype, xp.floating):
        return array.astype(xp.float32).view(xp.uint32)
    return array.astype(xp.uint32)


def _mix(xp: Any, word: Any) -> Any:
    """Spreads every bit of uint32 words over all others (the finaliser of MurmurHash3)."""
    word = (word ^ (word >> 16)) * xp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * xp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
