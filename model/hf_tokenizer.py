"""The tokenizer's part of an export for transformers: the SentencePiece model as it is, and how it is to be read."""

from __future__ import annotations

import fnmatch
import json
from typing import NamedTuple

from openmoe.model import hf_files, interop
from openmoe.model.config import ModelConfig
from openmoe.model.interop import CheckpointError

# What transformers reads of any tokenizer; its code is not carried over: ours is part of every export.
FILES = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
BOS_ID, EOS_ID = 0, 1  # as config.json says of every model


class SentencePieceModel(NamedTuple):
    """A tokenizer that goes along with a model."""

    proto: bytes  # the file
    pieces: tuple[str, ...]  # by id
    eos_id: int
    num_sentinels: int


def files(tokenizer: SentencePieceModel, config: ModelConfig) -> dict[str, bytes]:
    """Returns what a folder needs for `AutoTokenizer.from_pretrained(..., trust_remote_code=True)`, by name.

    Raises:
      CheckpointError: the model was not trained with such a tokenizer.
    """
    pieces, sentinels = len(tokenizer.pieces), tokenizer.num_sentinels
    if pieces != config.text_vocab_size or pieces + sentinels > config.vocab_size:
        raise CheckpointError(
            f"tokenizer: the model has {config.text_vocab_size} pieces of text and room for "
            f"{config.vocab_size - config.text_vocab_size} sentinels, got {pieces} and {sentinels}; "
            "give the one it was trained with"
        )
    if tokenizer.eos_id != EOS_ID:
        raise CheckpointError(f"tokenizer: id {EOS_ID} must end a sequence, got {tokenizer.eos_id}; give another")
    content = {
        "tokenizer_class": "OpenMoeTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_openmoe.OpenMoeTokenizer", None]},
        "num_sentinels": sentinels,
        "bos_token": tokenizer.pieces[BOS_ID],
        "pad_token": tokenizer.pieces[BOS_ID],
        "eos_token": tokenizer.pieces[EOS_ID],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.model": tokenizer.proto,
        "tokenizer_config.json": (json.dumps(content, indent=2) + "\n").encode(),
    }


def files_in(path: str) -> dict[str, bytes]:
    """Returns the files of the tokenizer that lies beside a model, by name, as they are; none if there is none.

    Args:
      path: the model's folder, local or gs://.

    Raises:
      CheckpointError: one of them cannot be read.
    """
    path = path.rstrip("/")
    try:
        entries = interop.files(path).ls(path, detail=True)
        there = sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] != "directory")
        return {name: _read(f"{path}/{name}") for name in there if _is_of_tokenizer(name)}
    except OSError as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be read: {' '.join(str(error).split())}") from error


def _is_of_tokenizer(name: str) -> bool:
    return not name.endswith(".py") and any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def _read(path: str) -> bytes:
    with hf_files.open_file(path, "rb") as file:
        return file.read()
