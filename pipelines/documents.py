"""A document, made of a line, a row or a file; or why it is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from openmoe.pipelines import chat

# What json.loads calls in the end; what it does before and after is a quarter of parsing lines of 600 bytes.
_decode = json.JSONDecoder().raw_decode


class Document(NamedTuple):
    """A document's text."""

    path: str
    offset: int  # byte of its line, in the uncompressed file; row of a Parquet file
    utf8: bytes
    repaired: bool  # lone surrogates were replaced by U+FFFD
    answer: bytes | None = None  # to the text, of a conversation

    @property
    def text(self) -> str:
        """The text as Python has it."""
        return self.utf8.decode()


REASONS = (
    *("bad_json", "not_utf8", "no_text", "not_string", "empty", "too_long", "one_token"),
    *("no_messages", "bad_roles"),  # of conversations
)


class BadLine(NamedTuple):
    """What was left out, and why."""

    path: str
    offset: int
    reason: str  # one of REASONS
    raw: bytes  # of one that is too long only the beginning, of a single token its text


def _parse_json(path: str, offset: int, raw: bytes) -> Any:
    """Returns the value of a line, or the BadLine that it is."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return BadLine(path, offset, "not_utf8", raw)
    try:
        value, end = _decode(text)
        if end == len(text):
            return value
    except (ValueError, RecursionError):
        pass  # as over space in front of the value, which json.loads looks for in each line
    if not text or raw.isspace():
        return BadLine(path, offset, "empty", raw)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return BadLine(path, offset, "bad_json", raw)


def parse_chat(path: str, offset: int, raw: bytes) -> Iterator[Document | BadLine]:
    """Yields a document for each answer of a conversation."""
    record = _parse_json(path, offset, raw)
    found = record if isinstance(record, BadLine) else chat.examples(record)
    if isinstance(found, BadLine):
        yield found
    elif isinstance(found, str):
        yield BadLine(path, offset, found, raw)
    else:
        for example in found:
            asked, answered = (_sanitize(path, offset, text, raw) for text in example)
            assert isinstance(asked, Document)  # neither is empty
            assert isinstance(answered, Document)
            yield asked._replace(answer=answered.utf8, repaired=asked.repaired or answered.repaired)


def parse_line(path: str, offset: int, raw: bytes) -> Document | BadLine:
    """Returns the document of a line of RedPajama."""
    record = _parse_json(path, offset, raw)
    if isinstance(record, BadLine):
        return record
    if not isinstance(record, dict) or record.get("text") is None:
        return BadLine(path, offset, "no_text", raw)
    if not isinstance(record["text"], str):
        return BadLine(path, offset, "not_string", raw)
    return _sanitize(path, offset, record["text"], raw)


def parse_text(path: str, row: int, raw: bytes) -> Document | BadLine:
    """Returns the document of a whole file, or of a row of one."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return BadLine(path, row, "not_utf8", raw)
    return BadLine(path, row, "empty", raw) if _is_empty(text) else Document(path, row, raw, False)


def _sanitize(path: str, offset: int, text: str, raw: bytes) -> Document | BadLine:
    """Returns the document; ASCII-escaped JSON carries lone surrogates, on which tokenizers fail."""
    if _is_empty(text):
        return BadLine(path, offset, "empty", raw)
    try:
        return Document(path, offset, text.encode(), False)
    except UnicodeEncodeError:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Document(path, offset, whole.encode(), True)


def _is_empty(text: str) -> bool:
    return not text or text.isspace()
