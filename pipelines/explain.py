"""Where a row comes from: each of its segments down to a document's file and offset, and its tokens as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import packing, passes, shards, storage, tokenizer, ul2
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.manifest import Manifest
from openmoe.pipelines.tokenizer import Tokenizer, Vocabulary


class Part(NamedTuple):
    """Tokens of one kind in a row: a mode's prompt, text, a sentinel, the end of inputs or targets."""

    kind: Literal["prompt", "text", "sentinel", "end"]
    text: str


class Origin(NamedTuple):
    """Where a document was read from: a byte of a file of lines, uncompressed, or a row of a Parquet file."""

    file: str
    offset: int
    unit: Literal["byte", "row"]
    hash: str  # BLAKE2b of its text, hexadecimal


class Segment(NamedTuple):
    """One piece of a document, corrupted or not.

    With packing `reference` a segment can be of several documents; those after the first are listed with no slots.

    Attributes:
      denoiser: by name; `next_token` or `chat` where there is none.
      origin: of the document.
      unit: of the source, as the manifest numbers them.
      document: of the unit.
      start: token of the document with which the piece begins.
      length: tokens of the piece.
      num_inputs: slots of the inputs, prompt and end included.
      num_targets: slots of the targets, on which loss is taken.
      inputs: what they hold.
      targets: what they hold.
    """

    denoiser: str
    origin: Origin
    unit: int
    document: int
    start: int
    length: int
    num_inputs: int
    num_targets: int
    inputs: list[Part]
    targets: list[Part]


class Explanation(NamedTuple):
    """A global row, taken apart.

    Attributes:
      row: its number.
      data_id: of the build.
      stream: its source by name, with the objective where the build has several.
      pass_number: of the stream.
      shard: file that holds it.
      row_in_shard: its number there.
      slots: of the row that are used.
      seq_len: slots of the row.
      segments: in the order of the row.
    """

    row: int
    data_id: str
    stream: str
    pass_number: int
    shard: str
    row_in_shard: int
    slots: int
    seq_len: int
    segments: list[Segment]


def explain(manifest_path: str, row: int) -> Explanation:
    """Takes a global row of a build apart.

    Raises:
      DataError: the row is not built.
    """
    loader, manifest = Loader(manifest_path), manifests.load(manifest_path)
    [at], [record] = loader.locate(row, row + 1), loader.records(row, row + 1)
    tokens, table = shards.decode(record)
    ends = np.cumsum(table["inputs"].astype(np.int64) + table["targets"])
    return Explanation(
        row=row,
        data_id=manifest.data_id,
        stream=manifest.stream_names[at.stream],
        pass_number=at.number,
        shard=passes.shard_path(manifest, *at[:3]),
        row_in_shard=at.row,
        slots=len(tokens),
        seq_len=manifest.seq_len,
        segments=[
            _segment(manifest, at.stream, segment, tokens[end - segment["inputs"] - segment["targets"] : end])
            for segment, end in zip(table, ends.tolist(), strict=True)
        ],
    )


def _segment(manifest: Manifest, stream: int, segment: np.void, tokens: np.ndarray) -> Segment:
    """Describes one entry of a row's SEGMENT table with its tokens, uint32[inputs + targets]."""
    fields = {name: int(segment[name]) for name in shards.SEGMENT.names or ()}
    text, vocabulary = tokenizer.load(manifest.tokenizer), manifest.vocabulary
    kind = fields["denoiser"]
    prompt = vocabulary.prompts[ul2.DENOISERS[kind].mode] if kind < packing.NEXT_TOKEN else ()
    ids = tokens.tolist()
    return Segment(
        denoiser=packing.KINDS[kind],
        origin=_origin(manifest, stream, fields["unit"], fields["document"]),
        unit=fields["unit"],
        document=fields["document"],
        start=fields["start"],
        length=fields["length"],
        num_inputs=fields["inputs"],
        num_targets=fields["targets"],
        inputs=_parts(ids[: fields["inputs"]], text, vocabulary, prompt=prompt),
        targets=_parts(ids[fields["inputs"] :], text, vocabulary),
    )


def _origin(manifest: Manifest, stream: int, unit: int, document: int) -> Origin:
    """Looks a document up in the token cache."""
    receipt = manifest.source_of(stream).units[unit]
    with storage.open_read(storage.join(manifest.data_dir, "tokens", f"{receipt['key']}.parquet")) as raw:
        file = pq.ParquetFile(raw)
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        group = int(np.searchsorted(np.cumsum(counts), document, side="right"))
        columns = file.read_row_group(group, columns=["file", "offset", "hash"])
    [found] = columns.slice(document - sum(counts[:group]), 1).to_pylist()
    kind = "row" if found["file"].endswith(".parquet") else "byte"
    return Origin(found["file"], found["offset"], kind, found["hash"].hex())


def _parts(ids: list[int], text: Tokenizer, vocabulary: Vocabulary, *, prompt: tuple[int, ...] = ()) -> list[Part]:
    """Returns what inputs or targets hold, in order."""
    parts: list[Part] = []
    if prompt and tuple(ids[: len(prompt)]) == prompt:
        parts, ids = [Part("prompt", text.decode(list(prompt)).strip())], ids[len(prompt) :]
    ended = bool(ids) and ids[-1] == vocabulary.eos_id
    parts += _runs(ids[:-1] if ended else ids, text, vocabulary)
    return [*parts, Part("end", "</s>")] if ended else parts


def _runs(ids: list[int], text: Tokenizer, vocabulary: Vocabulary) -> Iterator[Part]:
    anchor = list(vocabulary.prompts["S2S"][:1])  # alone, a run would lose the space that it begins with
    for is_sentinel, run in itertools.groupby(ids, key=lambda token: token >= vocabulary.text_vocab_size):
        if is_sentinel:
            yield from (Part("sentinel", text.decode([token], vocabulary.num_sentinels)) for token in run)
        else:
            yield Part("text", text.decode([*anchor, *run])[len(text.decode(anchor)) :])
