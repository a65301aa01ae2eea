"""SentencePiece with UL2's sentinels above its ids.

Documents are tokenized by the bare model, so that no text can inject a sentinel; sentinels are arithmetic:
`<extra_id_0>` is the highest id, `text_vocab_size + num_sentinels - 1`, and they descend.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from typing import NamedTuple

import numpy as np
import sentencepiece

from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError
from openmoe.pipelines.storage import StorageError

_BUILTIN = "builtin:"


class Vocabulary(NamedTuple):
    """The ids that the UL2 objective needs of a tokenizer."""

    text_vocab_size: int  # ids below it are pieces of the model
    num_sentinels: int
    eos_id: int
    prompts: dict[str, tuple[int, ...]]  # mode ("NLU", "NLG", "S2S") to the ids of its prompt

    @property
    def first_sentinel(self) -> int:
        """The id of `<extra_id_0>`; the following sentinels descend from it."""
        return self.text_vocab_size + self.num_sentinels - 1


class Tokenizer:
    """A SentencePiece model, by path, gs:// URI or `builtin:<name>`."""

    def __init__(self, uri: str) -> None:
        proto = self.proto = _model_bytes(uri)
        # Threads of its own would be one for each CPU of the host, of which a work unit has one.
        self._processor = sentencepiece.SentencePieceProcessor(num_threads=1)
        try:
            if not proto:
                raise RuntimeError("the file is empty")
            self._processor.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise DataError(f"tokenizer: {uri} is no SentencePiece model; give a spiece.model file") from error
        if self._processor.eos_id() < 0:
            raise DataError(f"tokenizer: {uri} has no end-of-sequence piece; UL2 ends every part with one")
        if _may_give_zero(self._processor):
            raise DataError(
                f"tokenizer: {uri} gives id 0, which is padding to the model, for text that it does not know; train it "
                "with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1, or with --byte_fallback"
            )
        self.text_vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.sha256: str = hashlib.sha256(proto).hexdigest()
        # Implementations and versions cut the same text differently, so the version is part of the identity.
        version = sentencepiece.__version__.encode()
        self.fingerprint: str = hashlib.sha256(hashlib.sha256(proto).digest() + version).hexdigest()

    def encode(self, texts: list[str] | list[bytes]) -> list[np.ndarray]:
        """Returns the ids of each text, uint32[tokens], with nothing added; bytes are UTF-8."""
        return [ids.view(np.uint32) for ids in self._processor.encode(texts, out_type="numpy")]

    def decode(self, ids: np.ndarray | list[int], num_sentinels: int = 0) -> str:
        """Returns the text of `ids`; sentinels appear as `<extra_id_0>` and so on."""
        first_sentinel = self.text_vocab_size + num_sentinels - 1
        text, pieces = "", []
        for token in map(int, ids):
            if token < self.text_vocab_size:
                pieces.append(token)
                continue
            name = first_sentinel - token
            text += self._processor.decode(pieces) + (f"<extra_id_{name}>" if name >= 0 else "<unused>")
            pieces = []
        return text + self._processor.decode(pieces)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The model's pieces by id."""
        return tuple(self._processor.id_to_piece(list(range(self.text_vocab_size))))

    def vocabulary(self, num_sentinels: int) -> Vocabulary:
        """Returns the ids that the UL2 objective needs, the mode prompts tokenized."""
        prompts = {m: tuple(map(int, self.encode([f"[{m}] "])[0])) for m in ("NLU", "NLG", "S2S")}
        return Vocabulary(self.text_vocab_size, num_sentinels, self.eos_id, prompts)


def _may_give_zero(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Returns whether text can have id 0: of what is unknown, unless such text is cut into bytes, or of a piece."""
    if model.is_unknown(0):
        return not any(model.is_byte(i) for i in range(model.vocab_size()))
    return not (model.is_control(0) or model.is_unused(0))


@functools.lru_cache(maxsize=4)
def load(uri: str) -> Tokenizer:
    """Returns the tokenizer of `uri`, loaded once a process."""
    return Tokenizer(uri)


def _model_bytes(uri: str) -> bytes:
    if not uri.startswith(_BUILTIN):
        return _file_bytes(uri)
    assets = importlib.resources.files("openmoe.pipelines.assets")
    file = assets / f"{uri.removeprefix(_BUILTIN)}.model"
    if not file.is_file():
        known = sorted(f"{_BUILTIN}{f.name.removesuffix('.model')}" for f in assets.iterdir() if ".model" in f.name)
        raise DataError(f"tokenizer: {uri} does not exist; built in: {', '.join(known)}")
    return file.read_bytes()


def _file_bytes(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except StorageError as error:
        if isinstance(error.__cause__, IsADirectoryError):
            raise DataError(f"tokenizer: {uri} is a folder; give a spiece.model file") from error
        raise type(error)(f"tokenizer: {error}") from error
