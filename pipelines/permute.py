"""Keyed randomness without state: keys from names, and permutations that are computed, not stored."""

from __future__ import annotations

import hashlib
import json

import numpy as np

_ROUNDS = 6


def key(*parts: int | str) -> int:
    """Returns the 128-bit key that belongs to a list of names and numbers."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "little")


def raw_stream(*parts: int | str) -> np.random.Philox:
    """Returns the Philox counter stream of a key.

    Only its raw 64-bit output is used: NumPy guarantees that stream for ever, its distributions not.
    """
    return np.random.Philox(key=key(*parts))


class Permutation:
    """A keyed bijection of [0, size): a Feistel network that is walked until it lands inside."""

    def __init__(self, size: int, *parts: int | str) -> None:
        self._size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = raw_stream(*parts).random_raw(_ROUNDS)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Returns the images, int64[n], of indices in [0, size)."""
        image = self._network(np.asarray(index).astype(np.uint64))
        while (outside := image >= np.uint64(self._size)).any():
            image[outside] = self._network(image[outside])
        return image.astype(np.int64)

    def _network(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> self._half_bits, value & self._mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & self._mask)
        return (left << self._half_bits) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit values (the finalizer of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
