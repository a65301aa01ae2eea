"""Numbers for people and programs: what JSON shows, what a terminal shows, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Fact(NamedTuple):
    """One derived number: what JSON shows, what people read, and how it came about."""

    key: str
    value: int | float | str | Sequence[float] | list[list[int]] | dict[str, int] | None
    text: str
    note: str = ""


class Section(NamedTuple):
    """Facts that belong together."""

    title: str
    facts: tuple[Fact, ...]


def count(key: str, value: int, note: str = "") -> Fact:
    """Returns a number of things."""
    text = f" ({short(value)})" if value >= 1_000_000 else ""
    return Fact(key, value, f"{value:,}{text}", note)


def num_bytes(key: str, value: int, note: str) -> Fact:
    """Returns a size in bytes."""
    return Fact(key, value, f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB", note)


def short(value: float) -> str:
    """Returns a number with the letter of its thousands: "1.05 T"."""
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {letter}"
    return f"{value:.0f}"


def listed(values: Sequence[int]) -> str:
    """Returns "1, 2, 4", or "none"."""
    return ", ".join(map(str, values)) or "none"
