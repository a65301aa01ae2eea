"""The rows that an ablation trains on: the quickstart's, through the real pipeline, built once."""

from __future__ import annotations

import numpy as np

from openmoe.model.checksum import KEYS
from openmoe.pipelines import build, stdlib_corpus, storage
from openmoe.pipelines.build import Workplace
from openmoe.pipelines.config import DataError
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.passes import Passes
from openmoe.platform.ablations import ablation
from openmoe.platform.ablations.ablation import BATCH_ROWS, SEQ_LEN
from openmoe.platform.ablations.ablation_run import Rows
from openmoe.platform.commands.progress import ProgressReport
from openmoe.platform.data import data_summary
from openmoe.platform.run import ray_session
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec import RunSpec
from openmoe.platform.run_file.spec_errors import Problem, SpecError

CORPUS_PATHS = ("wikipedia/*.jsonl", "c4/*.jsonl", "common_crawl/*/*.jsonl.zst", "the_stack/data/*/*.parquet")


def data_spec(folder: str) -> RunSpec:
    """Returns the quickstart with its corpus and data in another folder."""
    paths = [f"data.sources.{i}.paths=[{storage.join(folder, 'corpus', path)}]" for i, path in enumerate(CORPUS_PATHS)]
    return spec.load("quickstart", [f"data_dir={folder}", f"data.seq_len={SEQ_LEN}", *paths])


def rows_of(folder: str, num_rows: int, show: ProgressReport) -> Rows:
    """Reads the first rows of the quickstart's data, which is built if it is not there; none of them is a repetition.

    Raises:
      SpecError: the corpus has fewer.
    """
    wanted = data_spec(folder)
    manifest = _built(wanted) or _build(wanted, folder, show)
    firsts = np.array([sum(group["rows"] for group in of_source[0]) for of_source in Passes(manifest).groups])
    available = manifest.mixture.rows_available(firsts)
    if num_rows > available:
        most = available // BATCH_ROWS * ablation.STEP_TOKENS
        message = f"the corpus has {most:,} tokens in rows that are all different; ask for at most {most}"
        raise SpecError([Problem("", f"--tokens {num_rows * SEQ_LEN}: {message}")])
    loader = Loader(manifest.path)
    batch = loader.rows(0, num_rows)
    return Rows(loader.data_id, {key: batch[key] for key in KEYS})


def _built(wanted: RunSpec) -> Manifest | None:
    """Returns the build of these settings if the first pass of all its sources is finished."""
    try:
        manifest = data_summary.builds(wanted.data, wanted.data_dir)[0]
    except DataError:
        return None
    return manifest if all(Passes(manifest).groups) else None


def _build(wanted: RunSpec, folder: str, show: ProgressReport) -> Manifest:
    corpus = storage.join(folder, "corpus")
    if not storage.exists(storage.join(corpus, "COMPLETE.json")):
        stdlib_corpus.write_corpus(corpus)
    place = Workplace(say=show.say)
    with ray_session.started(wanted.cluster):
        manifest = build.tokenize(wanted.data, wanted.data_dir, show, place)
        built = Passes(manifest)
        build.pack(built, built.first_passes(), show, place)
    return manifest
