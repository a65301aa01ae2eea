"""Proves a build: every artefact is there and holds what its receipt says, and receipts say what the manifest wants.

First what is stated: files are listed, receipts read and compared with the manifest, so that every unit is in every
finished pass once. Then what is held: the digest of each artefact, and its contents counted anew: documents, tokens,
rows, slots, and of each unit in a group as many tokens as it has. A contradiction is what a reader would stop at or be
misled by; an artefact without a receipt is read by nobody, and listed alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from openmoe.pipelines import passes, reference, selection, shards, storage, token_cache
from openmoe.pipelines.manifest import Manifest, SourceManifest
from openmoe.pipelines.tokenizer import Vocabulary

AT_ONCE = 4  # artefacts that are read, each as a whole

Report = Callable[[str, int, int, str], None]

_MISSING = "is missing, and there is a receipt of it; delete that and build again"


class Contradiction(NamedTuple):
    """What is wrong with a file, or with what it says."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Artefact(NamedTuple):
    """A file that a receipt vouches for."""

    path: str
    kind: Literal["tokens", "split", "rows"]
    receipt: dict[str, Any]
    tokens: Mapping[int, int] = MappingProxyType({})  # of rows: how many of each unit of the source they hold
    lossy: bool = False  # of rows: packed as the original did, which loses tokens


class Findings(NamedTuple):
    """What an audit found.

    Attributes:
      units: of all sources.
      groups: that are packed.
      rows: that they hold.
      validation_rows: of them, those of what was kept apart, which is in no pass.
      artefacts: files that receipts vouch for.
      read: those of them whose contents were compared.
      read_bytes: of those.
      contradictions: in the order of the manifest, stated ones first.
      orphans: artefacts without a receipt: of a build that is at work or was killed; the next one replaces them.
      bad: documents that were left out, by source and reason.
      quarantined: units that were left out, with the reason.
      cut_off: tokens that `packing: reference` cut off its examples, as receipts say.
      lone: tokens of text that it made no example of, since one alone is none.
    """

    units: int
    groups: int
    rows: int
    validation_rows: int
    artefacts: int
    read: int
    read_bytes: int
    contradictions: list[Contradiction]
    orphans: list[str]
    bad: dict[str, dict[str, int]]
    quarantined: list[str]
    cut_off: int
    lone: int


def audit(manifest: Manifest, *, sample: int | None = None, report: Report = lambda *progress: None) -> Findings:
    """Compares a build with its receipts.

    Args:
      manifest: of the build; what other builds have in the same directory is left alone.
      sample: read so many artefacts only, drawn anew each time; that they are there is seen for all.
      report: told of progress.
    """
    stated = _Stated(manifest)
    parts = [stated.add_units, *(functools.partial(stated.add_stream, s) for s in range(len(manifest.streams)))]
    for done, add in enumerate(parts, 1):
        add()
        report("receipts", done, len(parts), "parts")
    artefacts, contradictions = stated.artefacts, stated.contradictions
    chosen = range(len(artefacts)) if sample is None else sorted(_drawn(len(artefacts), sample))
    read_bytes = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        held = pool.map(lambda index: _held(manifest, artefacts[index]), chosen)
        for done, (size, wrong) in enumerate(held, 1):
            read_bytes += size
            contradictions += wrong
            report("audit", done, len(chosen), "files")
    groups = [each.receipt for each in artefacts if each.kind == "rows"]
    return Findings(
        units=sum(len(source.units) for source in manifest.sources),
        groups=len(groups),
        rows=sum(group.get("rows", 0) for group in groups),
        validation_rows=sum(group.get("rows", 0) for group in groups if "group" not in group),
        artefacts=len(artefacts),
        read=len(chosen),
        read_bytes=read_bytes,
        contradictions=contradictions,
        orphans=stated.orphans,
        bad={source.name: bad_of(source) for source in manifest.sources},
        quarantined=[f"{s.name}: {unit}" for s in manifest.sources for unit in quarantined_of(s)],
        cut_off=sum(group.get("cut_off_tokens", 0) for group in groups),
        lone=sum(group.get("lone_tokens", 0) for group in groups),
    )


def _drawn(count: int, sample: int) -> list[int]:
    return random.sample(range(count), min(sample, count))


def quarantined_of(source: SourceManifest) -> list[str]:
    """Returns the units of a source that were left out, with the reason."""
    return [
        f"{unit['path']} [{unit['start']}, {unit['stop']}): {unit['quarantined']}"
        for unit in source.units
        if "quarantined" in unit
    ]


class _Stated:
    """What the receipts of a build say, gathered part by part."""

    def __init__(self, manifest: Manifest) -> None:
        self.artefacts: list[Artefact] = []
        self.contradictions: list[Contradiction] = []
        self.orphans: list[str] = []
        self._manifest = manifest
        self._names = functools.cache(lambda folder: frozenset(storage.list_files(folder)))

    def add_units(self) -> None:
        """Takes in the token cache, and which documents of it are trained on."""
        folder = storage.join(self._manifest.data_dir, "tokens")
        units = [unit for source in self._manifest.sources for unit in source.units]
        paths = [storage.join(folder, f"{unit['key']}.json") for unit in units]
        for unit, path, content in zip(units, paths, storage.read_all(paths), strict=True):
            wanted = {key: value for key, value in unit.items() if key != "split"}
            of_unit = [Artefact(storage.join(folder, f"{unit['key']}.parquet"), "tokens", unit)]
            if "split" in unit:
                split = storage.join(self._manifest.data_dir, unit["split"]["path"])
                of_unit.append(Artefact(split, "split", {**unit["split"], "documents": unit["documents"]}))
            self._add(path, differences(_parsed(content), wanted), of_unit)
        self.orphans += [storage.join(folder, name) for name in orphans(self._names(folder))]

    def add_stream(self, stream: int) -> None:
        """Takes in the passes of a stream, and the shards of what was kept apart."""
        units = self._manifest.source_of(stream).units
        folder = storage.join(self._manifest.data_dir, self._manifest.streams[stream].passes)
        for name in storage.list_folders(folder):
            if name.isdecimal():
                self._add_pass(stream, int(name))
            elif name == "validation":
                groups = passes.validation_groups(self._manifest, stream)
                wanted = [{"units": of_group} for of_group in groups]
                tokens = [{unit: units[unit]["split"][name]["tokens"] for unit in of_group} for of_group in groups]
                self._add_groups(stream, storage.join(folder, name), wanted, tokens)

    def _add_pass(self, stream: int, number: int) -> None:
        folder, groups = self._manifest.pass_folder(stream, number), self._manifest.groups(stream, number)
        units = self._manifest.source_of(stream).units
        wanted = [{"number": number, "group": group, "units": of_group} for group, of_group in enumerate(groups)]
        tokens = [{unit: selection.trained_tokens(units[unit]) for unit in of_group} for of_group in groups]
        receipts = self._add_groups(stream, folder, wanted, tokens)
        if "pass.json" in self._names(folder):
            path = storage.join(folder, "pass.json")
            recorded = (_parsed(storage.read_if_present(path)) or {}).get("groups", [])
            self._add(path, unlike_a_pass(recorded, receipts, groups), [])

    def _add_groups(
        self, stream: int, folder: str, wanted: list[dict[str, Any]], tokens: list[dict[int, int]]
    ) -> dict[int, dict[str, Any]]:
        """Takes in the shards of a folder, and returns their receipts by group.

        Args:
          stream: by its number.
          folder: of one pass.
          wanted: what the receipt of each group must say of it.
          tokens: of each unit, by group.
        """
        names = sorted(name for name in self._names(folder) if name.endswith(".json") and name != "pass.json")
        receipts: dict[int, dict[str, Any]] = {}
        contents = storage.read_all(storage.join(folder, name) for name in names)
        for name, content in zip(names, contents, strict=True):
            path, stem, receipt = storage.join(folder, name), name.removesuffix(".json"), _parsed(content)
            if not stem.isdecimal() or int(stem) >= len(wanted):
                self._add(path, [f"is of no group: the pass has {len(wanted)}"], [])
                continue
            group = int(stem)
            receipts[group] = receipt or {}
            said = receipt and {key: receipt.get(key) for key in wanted[group]}
            shard = storage.join(folder, f"{stem}.array_record")
            shard = Artefact(shard, "rows", receipts[group], tokens[group], self._manifest.is_reference(stream))
            self._add(path, differences(said, wanted[group]), [shard])
        self.orphans += [storage.join(folder, name) for name in orphans(self._names(folder))]
        return receipts

    def _add(self, path: str, wrong: Iterable[str], artefacts: list[Artefact]) -> None:
        """Takes in what contradicts a receipt, and its artefacts, which are to be read if nothing does."""
        found = [Contradiction(path, what) for what in wrong]
        self.contradictions += found
        for artefact in artefacts:
            folder, name = artefact.path.rsplit("/", 1)
            # Looked up again: what a build makes now may have been listed in part.
            if name not in self._names(folder) and not storage.exists(artefact.path):
                self.contradictions.append(Contradiction(artefact.path, _MISSING))
            elif not found:
                self.artefacts.append(artefact)


def bad_of(source: SourceManifest) -> dict[str, int]:
    """Returns how many documents of a source were left out, by reason."""
    counts: Counter[str] = Counter()
    for unit in source.units:
        counts.update(unit["bad"])
    return dict(sorted(counts.items()))


def unlike_a_pass(
    recorded: list[dict[str, Any]], receipts: dict[int, dict[str, Any]], groups: list[list[int]]
) -> Iterator[str]:
    """Yields in what the record of a finished pass differs from its receipts, or has not every unit once.

    Args:
      recorded: receipts of all groups, as the record has them.
      receipts: as they are, by group.
      groups: the units of each.
    """
    if len(recorded) != len(groups):
        yield f"says that the pass is finished with {len(recorded)} groups, should be {len(groups)}"
    for group, receipt in enumerate(recorded[: len(groups)]):
        if group not in receipts:
            yield f"says that the pass is finished, but group {group} has no receipt"
        else:
            yield from (f"of group {group} {what}" for what in differences(receipt, receipts[group]))
    held = Counter(unit for receipt in recorded for unit in receipt.get("units", ()))
    for unit in sorted({unit for of_group in groups for unit in of_group} | held.keys()):
        if held[unit] != 1:
            yield f"has unit {unit} {held[unit]} times: a pass has every unit once"


def orphans(names: frozenset[str]) -> list[str]:
    """Returns those files of a folder to which no receipt belongs."""
    return sorted(name for name in names if not name.endswith(".json") and f"{name.split('.')[0]}.json" not in names)


def differences(said: dict[str, Any] | None, wanted: dict[str, Any]) -> Iterator[str]:
    """Yields in what a receipt differs from what it should say; None is one that is missing or no JSON."""
    if said is None:
        yield "is missing, or no receipt"
        return
    for key in sorted(said.keys() | wanted.keys()):
        if said.get(key) != wanted.get(key):
            yield f"says {key} {_short(said.get(key))}, should say {_short(wanted.get(key))}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    try:
        value = json.loads(content or b"null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _held(manifest: Manifest, artefact: Artefact) -> tuple[int, list[Contradiction]]:
    """Returns the bytes of an artefact, and how they contradict its receipt."""
    content = storage.read_if_present(artefact.path)
    if content is None:
        return 0, [Contradiction(artefact.path, _MISSING)]
    sha256 = hashlib.sha256(content).hexdigest()
    wanted = artefact.receipt.get("sha256", "no digest")
    if sha256 != wanted:
        what = f"is damaged: {len(content):,} bytes of sha256 {sha256[:16]}..., its receipt says {wanted[:16]}..."
        return len(content), [Contradiction(artefact.path, f"{what}; delete both and build again")]
    if artefact.kind == "rows":
        wrong = _wrong_rows(content, artefact, manifest.vocabulary)
    else:
        wrong = {"tokens": _wrong_tokens, "split": _wrong_split}[artefact.kind](content, artefact)
    return len(content), [Contradiction(artefact.path, what) for what in wrong]


def _wrong_tokens(content: bytes, artefact: Artefact) -> Iterator[str]:
    found = token_cache.parse_documents(content)
    held = {"documents": len(found.lengths), "tokens": int(found.lengths.sum())}
    if "documents_sha256" in artefact.receipt:  # not in builds from before there was one
        held["documents_sha256"] = found.sha256()
    yield from _unlike(held, artefact.receipt)


def _wrong_split(content: bytes, artefact: Artefact) -> Iterator[str]:
    counts = np.bincount(np.frombuffer(content, np.uint8), minlength=len(selection.PARTS)).tolist()
    held = {name: {**artefact.receipt[name], "documents": n} for name, n in zip(selection.PARTS, counts, strict=False)}
    yield from _unlike({**held, "documents": len(content)}, artefact.receipt)


def _wrong_rows(content: bytes, artefact: Artefact, vocabulary: Vocabulary) -> Iterator[str]:
    held, segments = shards.count(shards.records(content))
    lengths = np.bincount(segments["unit"], weights=segments["length"]).astype(int).tolist()
    found = {unit: tokens for unit, tokens in enumerate(lengths) if tokens}
    if artefact.lossy and "cut_off_tokens" in artefact.receipt:  # counted since it is known to be lost
        lone = sum(artefact.tokens.values()) - sum(lengths)
        held |= {"cut_off_tokens": reference.cut_off(segments, vocabulary), "lone_tokens": lone}
    yield from _unlike(held, artefact.receipt)
    for unit in sorted(found.keys() | artefact.tokens.keys()):
        got, wanted = found.get(unit, 0), artefact.tokens.get(unit, 0)
        if got > wanted or (got < wanted and not artefact.lossy):  # what is lost of all units was compared above
            yield f"holds {got:,} tokens of unit {unit}, should hold {wanted:,}"


def _unlike(held: dict[str, Any], receipt: dict[str, Any]) -> Iterator[str]:
    for key, value in held.items():
        if value != receipt.get(key):
            yield f"holds {key} {_short(value)}, its receipt says {_short(receipt.get(key))}"
