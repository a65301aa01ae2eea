"""Which documents of the token cache are trained on: exact duplicates and a validation split are taken out.

The first of equal documents stays, in plan order: sources as in the run file, their units in order, documents in
units. Nothing is tokenized again: what comes out is one byte a document. Three kinds of tasks, each a pure function
of what was tokenized, so that no order of work changes a byte, and each of bounded memory:

    sort     a slab of consecutive units: the hashes of its documents, sorted
    unite    a bucket, that is a range of hashes: which documents of which slab were there before
    split    a slab: the part that each of its documents belongs to, a file for each unit
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from openmoe.pipelines import storage, token_cache

# Part of the folder's name: raise it when the same documents would be selected otherwise.
VERSION = 1
TRAIN, VALIDATION, DUPLICATE = 0, 1, 2
PARTS = ("train", "validation", "duplicate")
SLAB_DOCUMENTS = 2**22  # some 400 MB while they are sorted
BUCKET_DOCUMENTS = 2**22


class Plan(NamedTuple):
    """What is selected from."""

    folder: str  # of the selection
    units: list[list[tuple[str, str]]]  # key and digest of each unit, by slab
    num_buckets: int  # 0: duplicates stay
    validation_share: float


def plan(data_dir: str, receipts: list[dict[str, Any]], *, dedup: bool, validation_share: float) -> Plan:
    """Returns how the documents of tokenized units, given in plan order, are gone through."""
    units = [(receipt["key"], receipt["sha256"]) for receipt in receipts]
    identity = json.dumps([VERSION, dedup, validation_share, units])
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    slabs: list[list[tuple[str, str]]] = [[]]
    held = total = 0
    for unit, receipt in zip(units, receipts, strict=True):
        if slabs[-1] and held + receipt["documents"] > SLAB_DOCUMENTS:
            slabs.append([])
            held = 0
        slabs[-1].append(unit)
        held += receipt["documents"]
        total += receipt["documents"]
    num_buckets = 1 + total // BUCKET_DOCUMENTS if dedup else 0
    return Plan(storage.join(data_dir, "selections", name), slabs, num_buckets, validation_share)


def write_plan(plan: Plan) -> None:
    """Writes the plan for the tasks, each of which would be too large if it carried it."""
    fields = {**plan._asdict(), "folder": ""}
    storage.create_if_absent(storage.join(plan.folder, "plan.json"), json.dumps(fields).encode())


@functools.lru_cache(maxsize=1)
def read_plan(folder: str) -> Plan:
    """Reads the plan of a selection."""
    return Plan(**json.loads(storage.read_bytes(storage.join(folder, "plan.json"))))._replace(folder=folder)


def sort(plan: Plan, slab: int) -> dict[str, Any]:
    """Sorts the hashes of a slab's documents; equal ones stay in plan order."""
    hashes = np.concatenate([part.hashes for part in _documents(plan, slab)])
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    entries = np.concatenate([hashes[order], order.astype(np.uint64)[:, None]], axis=1)
    buckets = (entries[:, 0] >> np.uint64(32)) * np.uint64(plan.num_buckets) >> np.uint64(32)
    _write_parts(_sorted_file(plan, slab), entries, np.searchsorted(buckets, np.arange(plan.num_buckets + 1)))
    return _commit(plan, f"sort-{slab:05d}", {"documents": len(entries)})


def unite(plan: Plan, bucket: int) -> dict[str, Any]:
    """Finds the documents of a bucket that came before, in the same slab or in an earlier one."""
    files = [_sorted_file(plan, slab) for slab in range(len(plan.units))]
    parts = [_read_part(file, bucket).reshape(-1, 3) for file in files]
    entries = np.concatenate(parts)
    slabs = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((entries[:, 1], entries[:, 0]))  # stable: plan order among equal ones
    entries, slabs = entries[order], slabs[order]
    repeated = np.zeros(len(entries), bool)
    repeated[1:] = (entries[1:, :2] == entries[:-1, :2]).all(axis=1)
    found, slabs = entries[repeated, 2], slabs[repeated]
    order = np.lexsort((found, slabs))
    _write_parts(_found_file(plan, bucket), found[order], np.searchsorted(slabs[order], np.arange(len(parts) + 1)))
    return _commit(plan, f"unite-{bucket:05d}", {"documents": len(entries), "duplicates": len(found)})


def split(plan: Plan, slab: int) -> dict[str, Any]:
    """Writes the part of each document of a slab's units; the receipt counts documents and tokens by part."""
    documents = _documents(plan, slab)
    found = [_read_part(_found_file(plan, b), slab) for b in range(plan.num_buckets)]
    parts = np.full(sum(len(unit.lengths) for unit in documents), TRAIN, np.uint8)
    # Other bits than those that choose the bucket; float64 holds 53 of them.
    draws = np.concatenate([unit.hashes[:, 1] >> np.uint64(11) for unit in documents])
    parts[draws < np.uint64(plan.validation_share * 2**53)] = VALIDATION
    for documents_found in found:
        parts[documents_found] = DUPLICATE
    units, at = {}, 0
    for (key, _), unit in zip(plan.units[slab], documents, strict=True):
        own = parts[at : at + len(unit.lengths)]
        at += len(own)
        content = own.tobytes()
        storage.write_durable(storage.join(plan.folder, f"{key}.split"), content)
        counts = {
            name: {"documents": int((own == part).sum()), "tokens": int(unit.lengths[own == part].sum())}
            for part, name in enumerate(PARTS)
        }
        path = "/".join(["selections", plan.folder.rsplit("/", 1)[1], f"{key}.split"])
        units[key] = {"path": path, "sha256": hashlib.sha256(content).hexdigest(), **counts}
    return _commit(plan, f"split-{slab:05d}", {"units": units})


def read(data_dir: str, receipt: dict[str, Any]) -> np.ndarray:
    """Returns the part of each document of a unit, uint8[documents]; all are trained on where nothing was selected."""
    if "split" not in receipt:
        return np.full(receipt["documents"], TRAIN, np.uint8)
    path = storage.join(data_dir, receipt["split"]["path"])
    return np.frombuffer(token_cache.read_checked(path, sha256=receipt["split"]["sha256"]), np.uint8)


def count(receipt: dict[str, Any], part: str) -> int:
    """Returns how many documents of a unit belong to a part."""
    if "split" in receipt:
        return receipt["split"][part]["documents"]
    return receipt["documents"] if part == "train" else 0


def count_tokens(receipt: dict[str, Any], part: str) -> int:
    """Returns how many tokens of a unit belong to a part."""
    if "split" in receipt:
        return receipt["split"][part]["tokens"]
    return receipt["tokens"] if part == "train" else 0


def trained_tokens(receipt: dict[str, Any]) -> int:
    """Returns the tokens of a unit that are trained on."""
    return count_tokens(receipt, "train")


def _documents(plan: Plan, slab: int) -> list[token_cache.Documents]:
    tokens = storage.join(plan.folder.rsplit("/", 2)[0], "tokens")
    return [token_cache.documents(tokens, key, sha256=sha256) for key, sha256 in plan.units[slab]]


def _sorted_file(plan: Plan, slab: int) -> str:
    return storage.join(plan.folder, f"sort-{slab:05d}.entries")


def _found_file(plan: Plan, bucket: int) -> str:
    return storage.join(plan.folder, f"unite-{bucket:05d}.duplicates")


def _write_parts(path: str, values: np.ndarray, bounds: np.ndarray) -> None:
    """Writes consecutive parts of rows of uint64, after a table of the bytes where each begins and the last ends."""
    row_bytes = values.itemsize * (values.shape[1] if values.ndim > 1 else 1)
    table = 8 * len(bounds) + bounds * row_bytes
    storage.write_durable(path, table.astype("<u8").tobytes() + values.astype("<u8").tobytes())


def _read_part(path: str, part: int) -> np.ndarray:
    """Reads one part of a file, and nothing else of it but where it lies."""
    begin, end = np.frombuffer(storage.read_range(path, 8 * part, 8 * part + 16), "<u8").tolist()
    return np.frombuffer(storage.read_range(path, begin, end) if begin < end else b"", "<u8")


def _commit(plan: Plan, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    receipt = {"key": name, **facts}
    storage.create_if_absent(storage.join(plan.folder, f"{name}.json"), json.dumps(receipt).encode())
    return receipt


def stages(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    """Yields the kinds of tasks with the names of their receipts; each kind needs all of the one before."""
    if plan.num_buckets:
        yield "sort", [f"sort-{slab:05d}" for slab in range(len(plan.units))]
        yield "unite", [f"unite-{bucket:05d}" for bucket in range(plan.num_buckets)]
    yield "split", [f"split-{slab:05d}" for slab in range(len(plan.units))]


def run(plan: Plan, name: str) -> dict[str, Any]:
    """Does the task of a receipt's name."""
    kind, number = name.split("-")
    return {"sort": sort, "unite": unite, "split": split}[kind](plan, int(number))
