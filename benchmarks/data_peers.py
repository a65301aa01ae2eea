"""What data.py measures beside ours, where it is installed: t5 and seqio, Hugging Face datasets, datatrove."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openmoe.pipelines import reference, shards, ul2
from openmoe.pipelines.tokenizer import Tokenizer, Vocabulary

HALF = 1024
EXAMPLES = 40  # whose masks t5 draws, to be given to us too


def _features(vocabulary: Vocabulary) -> dict[str, Any]:
    import seqio

    size = vocabulary.text_vocab_size + vocabulary.num_sentinels
    of_ids = seqio.PassThroughVocabulary(size, eos_id=vocabulary.eos_id)
    return {key: seqio.Feature(of_ids, add_eos=True, dtype="int32") for key in ("inputs", "targets")}


def _finish(examples: Any, features: dict[str, Any]) -> Any:
    """Examples to rows, as a seqio task and its feature converter do it."""
    import seqio

    lengths = {"inputs": HALF, "targets": HALF}
    examples = seqio.preprocessors.append_eos_after_trim(examples, output_features=features, sequence_length=lengths)
    return seqio.PrefixLMFeatureConverter(pack=True)(examples, task_feature_lengths=lengths)


def _with_prompt(examples: Any, prompt: tuple[int, ...]) -> Any:
    import tensorflow as tf

    return examples.map(lambda x: {**x, "inputs": tf.concat([tf.constant(prompt, tf.int32), x["inputs"]], 0)})


def t5_pipeline(tokens: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary) -> Callable[[], int]:
    """Returns the work: documents to rows through t5's and seqio's own functions, put together as UL2 does."""
    import tensorflow as tf
    from t5.data import preprocessors as t5

    features = _features(vocabulary)
    documents = tf.RaggedTensor.from_row_lengths(tokens.astype(np.int32), lengths)

    def branch(text: Any, denoiser: ul2.Denoiser) -> Any:
        cut = t5.split_tokens(text, max_tokens_per_segment=reference.example_tokens(denoiser, HALF))
        if not denoiser.mean_span:
            functions = (t5.drop_nonnoise_tokens, t5.drop_noise_tokens, t5.random_prefix_noise_mask, 0.5)
        else:
            mask = functools.partial(t5.random_spans_noise_mask, mean_noise_span_length=denoiser.mean_span)
            functions = (t5.noise_span_to_unique_sentinel, t5.nonnoise_span_to_unique_sentinel, mask, denoiser.density)
        inputs_fn, targets_fn, mask_fn, density = functions
        noisy = t5.denoise(
            cut, features, noise_density=density, noise_mask_fn=mask_fn, inputs_fn=inputs_fn, targets_fn=targets_fn
        )
        return _with_prompt(noisy, vocabulary.prompts[denoiser.mode])

    text = tf.data.Dataset.from_tensor_slices({"targets": documents})
    text = t5.reduce_concat_tokens(text, batch_size=8)  # so that each branch has several of a small corpus
    branches = [branch(text.shard(len(ul2.DENOISERS), i), d) for i, d in enumerate(ul2.DENOISERS)]
    shares = [d.tenths / 10 for d in ul2.DENOISERS]
    rows = _finish(tf.data.Dataset.sample_from_datasets(branches, shares, seed=7), features)

    def work() -> int:
        for _ in rows:
            pass
        return len(tokens)  # each branch is read to its end

    return work


def assert_same_as_t5(tokens: np.ndarray, vocabulary: Vocabulary) -> None:
    """Raises AssertionError unless t5 and seqio make the very rows of us that we make of the masks they drew."""
    import tensorflow as tf
    from t5.data import preprocessors as t5

    features = _features(vocabulary)
    of_ids = features["inputs"].vocabulary
    examples, kinds, runs, pieces = [], [], [], []
    for number in range(EXAMPLES):
        kind = number % len(ul2.DENOISERS)
        denoiser = ul2.DENOISERS[kind]
        length = reference.example_tokens(denoiser, HALF) // (1 + number % 3)  # whole ones, and ends of documents
        at = number * 997 % (len(tokens) - length)
        piece, seeds = tokens[at : at + length], tf.constant([[number, 1], [number, 2]], tf.int32)
        ids, length = tf.constant(piece.astype(np.int32)), tf.constant(length, tf.int32)
        if denoiser.mean_span:
            mask = t5.random_spans_noise_mask(length, denoiser.density, seeds, denoiser.mean_span)
            inputs = t5.noise_span_to_unique_sentinel(ids, mask, of_ids, seeds)
            targets = t5.nonnoise_span_to_unique_sentinel(ids, mask, of_ids, seeds)
        else:
            mask = ~t5.random_prefix_noise_mask(length, 0.5, seeds[:1])  # its noise is the prefix
            inputs, targets = tf.boolean_mask(ids, ~mask), tf.boolean_mask(ids, mask)
        prompt = tf.constant(vocabulary.prompts[denoiser.mode], tf.int32)
        examples.append({"inputs": tf.concat([prompt, inputs], 0), "targets": targets})
        changes = np.flatnonzero(np.diff(mask.numpy().astype(np.int8))) + 1
        runs.append(np.diff([0, *changes.tolist(), len(piece)]))
        kinds.append(kind)
        pieces.append(piece)
    spec = {key: tf.TensorSpec([None], tf.int32) for key in ("inputs", "targets")}
    theirs = list(_finish(tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec), features))
    for row, batch in zip(theirs, _our_rows(kinds, runs, pieces, vocabulary), strict=True):
        for ours, of_seqio in {
            "target_ids": "decoder_target_tokens",
            "input_ids": "decoder_input_tokens",
            "loss_weights": "decoder_loss_weights",
            "segment_ids": "decoder_segment_ids",
            "positions": "decoder_positions",
        }.items():
            np.testing.assert_array_equal(batch[ours][0], row[of_seqio].numpy(), err_msg=of_seqio)


def _our_rows(
    kinds: list[int], runs: list[np.ndarray], pieces: list[np.ndarray], vocabulary: Vocabulary
) -> list[dict[str, np.ndarray]]:
    kept, masked = (np.concatenate([r[first::2] for r in runs]) for first in (0, 1))
    first_run = np.cumsum([0, *(len(r) // 2 for r in runs[:-1])])
    noisy = ul2.assemble(np.concatenate(pieces), np.asarray(kinds), kept, masked, first_run, vocabulary)
    segments = reference.trim(noisy, HALF, vocabulary.eos_id)
    sizes = segments.num_inputs + segments.num_targets
    row, ends = reference.assign_rows(sizes, 2 * HALF), np.cumsum(sizes)
    batches = []
    for number in range(row[-1] + 1):
        of_row = np.flatnonzero(row == number)
        table = np.zeros(len(of_row), shards.SEGMENT)
        table["inputs"], table["targets"] = segments.num_inputs[of_row], segments.num_targets[of_row]
        text = segments.tokens[ends[of_row[0]] - sizes[of_row[0]] : ends[of_row[-1]]]
        batches.append(shards.batch([shards.encode(text, table)], 2 * HALF))
    return batches


def _jsonl(texts: list[str], folder: str) -> str:
    """Writes texts as a file of their own in a folder, and returns its path."""
    path = Path(folder) / "text.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": str(n)}) + "\n" for n, text in enumerate(texts)))
    return str(path)


def _hf_tokenizer(text: Tokenizer, folder: str) -> str:
    """Writes our SentencePiece model as a file of Hugging Face's tokenizers, and returns its path."""
    import tokenizers

    model = text._processor
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    unigram = tokenizers.models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=True)
    as_theirs = tokenizers.Tokenizer(unigram)
    as_theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    path = str(Path(folder) / "tokenizer.json")
    as_theirs.save(path)
    return path


def hf_datasets(texts: list[str], text: Tokenizer) -> Callable[[], int]:
    """Returns the work: a data set's `map` over batches, into Arrow files."""
    import datasets
    import tokenizers

    datasets.disable_progress_bars()
    home = tempfile.TemporaryDirectory()
    model = tokenizers.Tokenizer.from_file(_hf_tokenizer(text, home.name))
    jsonl = _jsonl(texts, home.name)

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=home.name) as folder:
            data = datasets.load_dataset("json", data_files=jsonl, split="train", cache_dir=folder)
            ids = data.map(
                lambda batch: {"ids": [each.ids for each in model.encode_batch(batch["text"])]},
                batched=True,
                remove_columns=["text", "id"],
                load_from_cache_file=False,
            )
            return sum(map(len, ids["ids"]))

    return work


def datatrove(texts: list[str], text: Tokenizer) -> Callable[[], int]:
    """Returns the work: JsonlReader to DocumentTokenizer, one task."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    home = tempfile.TemporaryDirectory()
    model = _hf_tokenizer(text, home.name)
    _jsonl(texts, f"{home.name}/in")

    def work() -> int:
        with tempfile.TemporaryDirectory(dir=home.name) as folder:
            tokenize = DocumentTokenizer(f"{folder}/out", tokenizer_name_or_path=model, eos_token=None)
            steps = [JsonlReader(f"{home.name}/in"), tokenize]
            LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{folder}/logs").run()
            files = sorted((Path(folder) / "out").glob("*.ds"))
            wide = 4 if text.text_vocab_size > 65536 else 2
            return sum(file.stat().st_size for file in files) // wide

    return work
