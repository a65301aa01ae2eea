"""The data pipeline beside what it could be: raw SentencePiece, raw reads, t5/seqio, datatrove, Hugging Face datasets.

    .venv/bin/python benchmarks/data.py [--tokenizer URI] [--text-bytes N] [--repeats N] [--json FILE]

Nothing on gs://; the text is Python's own library, written as RedPajama and The Stack files. One process, but for whole
builds with one and with two workers, under a Ray of their own where the package is installed. All rates are per second
of CPU, of all threads and workers, since machines have other things to do: the best of some repeats, which take turns,
with the spread between the best and the worst. Peers that are not installed are named. Where t5 and seqio
are, the rows of `packing: reference` are first compared with what they make of the same masks: all must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
import clone

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import objectives, passes, shards, sources, stdlib_corpus, token_cache, tokenizer
from openmoe.pipelines.config import DataConfig, SourceConfig
from openmoe.pipelines.loader import Loader

PACKERS = (("ul2", "budgeted"), ("ul2", "reference"), ("next_token", "budgeted"), ("prefix_lm", "budgeted"))
BATCH_ROWS = 64
COPIES = 4  # of the text that is tokenized
MIN_CPU_S = 0.3  # a work is done again until it took so long


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What something did: units a second of CPU, at best and in each turn; the worst by the best; a yardstick."""

    part: str
    name: str
    unit: str
    per_cpu_s: float
    spread: float
    turns: tuple[float, ...]
    beside: str = ""
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text files, their documents, and these tokenized."""

    folder: str
    config: DataConfig
    texts: list[str]
    tokens: np.ndarray  # uint32[total]
    lengths: np.ndarray  # int64[documents]


def cpu_s() -> float:
    """Seconds of CPU that this process and the children it waited for have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(part: str, unit: str, works: Mapping[str, Callable[[], int]], repeats: int) -> list[Rate]:
    """Lets works take turns; each does the same every time and returns how many units that was. No repeats: once."""
    return measured_by_piece(part, unit, {name: [work] for name, work in works.items()}, repeats)


def measured_by_piece(part: str, unit: str, works: dict[str, list[Callable[[], int]]], repeats: int) -> list[Rate]:
    """The same for works of as many pieces each: they take turns after each piece, and meet the same neighbours."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        units, spent_s = dict.fromkeys(works, 0), dict.fromkeys(works, 0.0)
        while not any(units.values()) or (repeats and min(spent_s.values()) < MIN_CPU_S):
            for pieces in zip(*works.values(), strict=True):
                for name, work in zip(works, pieces, strict=True):
                    start_s = cpu_s()
                    units[name] += work()
                    spent_s[name] += cpu_s() - start_s
        for name in works if turn or not repeats else ():  # the first turn warms up
            rates[name].append(units[name] / spent_s[name])
        print(f"{part}: {turn} of {repeats}", file=sys.stderr, flush=True)
    return [rate_of(part, name, unit, found) for name, found in rates.items()]


def rate_of(part: str, name: str, unit: str, turns: list[float]) -> Rate:
    spread = min(turns) / max(turns)
    return Rate(part=part, name=name, unit=unit, per_cpu_s=max(turns), spread=spread, turns=tuple(turns))


def beside(rates: list[Rate], yardstick: Rate, label: str) -> list[Rate]:
    """Returns the rates with their ratio to a yardstick: the median of turns where both took them, else of the best."""

    def ratio(rate: Rate) -> float:
        if rate.part != yardstick.part:
            return rate.per_cpu_s / yardstick.per_cpu_s
        return statistics.median(own / other for own, other in zip(rate.turns, yardstick.turns, strict=True))

    return [replace(rate, beside=label, ratio=ratio(rate)) for rate in rates]


def write_corpus(folder: str, tokenizer_uri: str, text_bytes: int) -> Corpus:
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=text_bytes // 2, max_code_bytes=text_bytes // 2)
    globs: dict[str, tuple[Literal["redpajama", "the_stack"], str]] = {
        "wikipedia": ("redpajama", "wikipedia/*.jsonl"),
        "c4": ("redpajama", "c4/*.jsonl"),
        "the_stack": ("the_stack", "the_stack/data/*/*.parquet"),
    }
    of_sources = tuple(
        SourceConfig(name=name, format=kind, paths=(f"{folder}/corpus/{glob}",), weight=1)
        for name, (kind, glob) in globs.items()
    )
    config = DataConfig(tokenizer=tokenizer_uri, seq_len=2048, seed=0, sources=of_sources)
    units = [unit for source in of_sources for unit in sources.inventory(source, config.unit_bytes)]
    texts = [record.text for unit in units for record in sources.read(unit) if isinstance(record, sources.Document)]
    documents = [ids for ids in tokenizer.load(tokenizer_uri).encode(texts) if len(ids) > 1]
    lengths = np.asarray([len(ids) for ids in documents], np.int64)
    return Corpus(folder=folder, config=config, texts=texts, tokens=np.concatenate(documents), lengths=lengths)


def tokenizing(corpus: Corpus, repeats: int) -> list[Rate]:
    """Tokens of text: the bare model, our work units from files to a token cache, and peers."""
    text = tokenizer.load(corpus.config.tokenizer)
    raw, ours = zip(*(_raw_and_ours(unit, text) for unit in _steady_units(corpus)), strict=True)
    works = {"SentencePiece, nothing else": list(raw), "ours, files to token cache": list(ours)}
    rates = measured_by_piece("tokenizing", "tokens", works, 2 * repeats)  # it is about a few hundredths
    of_peers: dict[str, Callable[[], int]] = {}
    if all(map(is_installed, ("datasets", "tokenizers"))):
        of_peers["HF datasets, map of HF tokenizers"] = peers().hf_datasets(corpus.texts, text)
    if all(map(is_installed, ("datatrove", "tokenizers", "orjson"))):
        of_peers["datatrove, DocumentTokenizer"] = peers().datatrove(corpus.texts, text)
    own = beside(rates, rates[0], "of SentencePiece")
    if not of_peers:
        return own
    bare = {"": lambda: sum(len(ids) for ids in text.encode(corpus.texts))}
    found = measured("tokenizing", "tokens", bare | of_peers, repeats)
    return [*own, *beside(found, found[0], "of SentencePiece")[1:]]


def _raw_and_ours(unit: sources.Unit, text: tokenizer.Tokenizer) -> tuple[Callable[[], int], Callable[[], int]]:
    """Returns two works over a unit: one call of SentencePiece over its texts, and the way from file to token cache.

    Both have their ids as NumPy arrays, and one thread; the first is given the texts as str, in memory.
    """
    texts = [record.text for record in sources.read(unit) if isinstance(record, sources.Document)]

    def raw() -> int:
        return sum(len(ids) for ids in text.encode(texts))

    def ours() -> int:
        with tempfile.TemporaryDirectory() as folder:
            return token_cache.tokenize(unit, text, folder)["tokens"]

    return raw, ours


def _steady_units(corpus: Corpus) -> list[sources.Unit]:
    """Returns units of files with the corpus several times, nearer to the size of a build's: each costs something."""
    for path in Path(corpus.folder, "corpus").rglob("*.*"):
        copies = Path(corpus.folder, "steady", path.relative_to(Path(corpus.folder, "corpus")))
        copies.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.concat_tables([pq.read_table(path)] * COPIES), copies, row_group_size=64)
        else:
            copies.write_bytes(path.read_bytes() * COPIES)
    steady = [
        replace(source, paths=(source.paths[0].replace("/corpus/", "/steady/"),)) for source in corpus.config.sources
    ]
    return [unit for source in steady for unit in sources.inventory(source, corpus.config.unit_bytes)]


def packing(corpus: Corpus, tokenized: list[Rate], repeats: int) -> list[Rate]:
    """Tokens of text to rows of 2,048, in memory."""
    vocabulary = tokenizer.load(corpus.config.tokenizer).vocabulary(corpus.config.num_sentinels)

    def work(objective: str, how: str) -> Callable[[], int]:
        pack = objectives.packer(objective, how)

        def pack_all() -> int:
            rows = pack(corpus.tokens, corpus.lengths, 2048, vocabulary, "benchmark")
            return sum(int(row.pieces.length.sum()) for row in rows)

        return pack_all

    works = {f"{objective}, {how}": work(objective, how) for objective, how in PACKERS}
    rates = beside(measured("packing", "tokens", works, repeats), tokenized[0], "x SentencePiece")
    if not has_t5():
        return rates
    print("t5: comparing rows", file=sys.stderr, flush=True)
    peers().assert_same_as_t5(corpus.tokens, vocabulary)
    theirs = {"t5/seqio, their functions": peers().t5_pipeline(corpus.tokens, corpus.lengths, vocabulary)}
    [of_t5] = measured("t5", "tokens", theirs, min(repeats, 2))
    times = beside(rates[:2], of_t5, "x t5/seqio")
    return [*rates, replace(of_t5, part="packing"), *times]


def reading(corpus: Corpus, repeats: int) -> list[Rate]:
    """Rows of a build: what a trainer gets of a loader, beside the same records read and nothing else."""
    text, of_sources = tokenizer.load(corpus.config.tokenizer), corpus.config.sources
    units = {source.name: sources.inventory(source, corpus.config.unit_bytes) for source in of_sources}
    receipts = {
        name: [token_cache.tokenize(unit, text, f"{corpus.folder}/tokens") for unit in of_source]
        for name, of_source in units.items()
    }
    path = manifests.manifest_path(corpus.folder, corpus.config, text, [u for of in units.values() for u in of])
    manifest = manifests.assemble(path, corpus.config, text, receipts)
    manifests.commit(manifest)
    for stream in range(len(manifest.streams)):
        numbers = range(len(manifest.groups(stream, 0)))
        passes.finish(manifest, stream, 0, [passes.pack_group(manifest, stream, 0, group) for group in numbers])
    loader = Loader(path, cache_dir=corpus.folder)
    shard, held = _largest(manifest, corpus.folder)

    def raw() -> int:
        return sum(len(shard.read(list(range(lo, hi)))) for lo, hi in _ranges(held))

    def records() -> int:
        return sum(len(loader.records(lo, hi)) for lo, hi in _ranges(loader.num_rows))

    def batches() -> int:
        return sum(len(loader.rows(lo, hi)["input_ids"]) for lo, hi in _ranges(loader.num_rows))

    works = {
        "ArrayRecord, one shard in order": raw,
        "loader, records": records,
        "loader, batches": batches,
    }
    rates = measured("reading", "rows", works, repeats)
    return beside(rates, rates[0], "of raw reads")


def building(corpus: Corpus, repeats: int) -> list[Rate]:
    """Tokens of files to shards by a build under Ray, with one worker and with two."""
    from openmoe.clusters import local_ray

    os.environ |= local_ray.environment()
    import ray

    from openmoe.pipelines import build

    text_bytes = sum(len(text.encode()) for text in corpus.texts)
    config = replace(corpus.config, unit_bytes=text_bytes // 16, group_tokens=len(corpus.tokens) // 16)
    rates: dict[tuple[int, str], list[float]] = {}
    ray.init(**local_ray.init_arguments(num_cpus=2, object_store_bytes=100_000_000))
    for turn in range(repeats + 1):
        for workers in (1, 2):
            place = build.Workplace(num_workers=workers)
            with tempfile.TemporaryDirectory() as folder:
                start_s, start_cpu_s = time.monotonic(), _ray_cpu_s()
                manifest = build.tokenize(config, folder, lambda *progress: None, place)
                built = passes.Passes(manifest)
                build.pack(built, built.first_passes(), lambda *progress: None, place)
                took = {"": _ray_cpu_s() - start_cpu_s, ", by the clock": time.monotonic() - start_s}
            for clock, seconds in took.items():
                if turn or not repeats:  # the first turn starts the workers
                    rates.setdefault((workers, clock), []).append(len(corpus.tokens) / seconds)
        print(f"building: {turn} of {repeats}", file=sys.stderr, flush=True)
    ray.shutdown()
    found = {
        (workers, clock): rate_of("building", f"{workers} worker{'s' * (workers > 1)}{clock}", "tokens", turns)
        for (workers, clock), turns in rates.items()
    }
    pairs = [
        beside([found[1, clock], found[2, clock]], found[1, clock], "x 1 worker") for clock in ("", ", by the clock")
    ]
    return [rate for pair in pairs for rate in pair]


def _ray_cpu_s() -> float:
    """Seconds of CPU that this process and Ray's workers, all alive, have used; none of Ray's own processes."""
    total_s = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended since
            if child.name().startswith("ray::"):
                total_s += sum(child.cpu_times()[:2])
    return total_s


def _ranges(num_rows: int) -> list[tuple[int, int]]:
    return [(at, min(at + BATCH_ROWS, num_rows)) for at in range(0, num_rows, BATCH_ROWS)]


def _largest(manifest: manifests.Manifest, folder: str) -> tuple[shards.Shard, int]:
    """Returns the shard of a build's first passes with the most rows, and these."""
    found = []
    for stream in range(len(manifest.streams)):
        for receipt in passes.Passes(manifest).receipts(stream)[0]:
            path = passes.shard_path(manifest, stream, 0, receipt["group"])
            found.append((receipt["rows"], path, receipt["sha256"]))
    rows, path, sha256 = max(found)
    return shards.Shard(path, sha256=sha256, cache_dir=folder), rows


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def has_t5() -> bool:
    return all(map(is_installed, ("t5", "seqio", "tensorflow")))


def peers() -> types.ModuleType:
    """The peers' side, which imports what is not installed everywhere."""
    import data_peers

    return data_peers


def report(corpus: Corpus, rates: list[Rate]) -> None:
    tokens, documents = len(corpus.tokens), len(corpus.lengths)
    print(f"\n{documents:,} documents, {tokens:,} tokens of {corpus.config.tokenizer}; rows of 2,048")
    print(f"{'':12} {'':36} {'a CPU-second':>20} {'worst/best':>10}")  # or one of the clock, where it says so
    for r in rates:
        line = f"{r.part:12} {r.name:36} {r.per_cpu_s:13,.0f} {r.unit:6} {r.spread:10.0%}"
        print(line if r.ratio is None else f"{line} {r.ratio:8.2f} {r.beside}")
    wanted = {"t5/seqio": has_t5(), "datatrove": is_installed("datatrove"), "datasets": is_installed("datasets")}
    for name, is_there in wanted.items():
        if not is_there:
            print(f"{name}: not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Data benchmark; the module's docstring says what it prints.")
    parser.add_argument("--tokenizer", default="builtin:small_8192")
    parser.add_argument("--text-bytes", type=int, default=16_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(folder, chosen.tokenizer, chosen.text_bytes)
        tokenized = tokenizing(corpus, chosen.repeats)
        rates = [*tokenized, *packing(corpus, tokenized, chosen.repeats), *reading(corpus, chosen.repeats)]
        if clone.is_installed:
            rates += building(corpus, chosen.repeats)
        report(corpus, rates)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(rate) for rate in rates], indent=2))


if __name__ == "__main__":
    main()
