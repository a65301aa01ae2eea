"""Real text and code that is on every machine: Python's own standard library, in the formats of real corpora.

    wikipedia/wiki.jsonl                     the language reference's topics (pydoc_data)
    c4/c4-train.00000-of-00001.jsonl         single docstrings
    common_crawl/<dump>/en_head_0000....zst  whole modules' documentation
    the_stack/data/python/*.parquet          sources
    COMPLETE.json                            summary, written last

Subset folders, names and fields are RedPajama's and The Stack's. Deterministic for an interpreter.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from openmoe.pipelines import storage
from openmoe.pipelines.config import DataError

FORMAT_VERSION = 1
_DUMP = "2023-06"
_CODE_FILES = 2
_MIN_DOCSTRING = 120  # characters; shorter ones are hardly documents
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_EVENTS = ("stars", "issues", "forks")


class Module(NamedTuple):
    """A source file of the standard library that could be read."""

    path: str  # relative to the library
    raw: bytes
    text: str


def write_corpus(directory: str, *, max_text_bytes: int = 2_000_000, max_code_bytes: int = 4_000_000) -> dict[str, Any]:
    """Writes the corpus unless it is complete already, and returns its summary.

    Args:
      directory: local or gs://.
      max_text_bytes: bytes of prose, shared by the three text subsets.
      max_code_bytes: bytes of source code.

    Returns:
      Documents and bytes by subset, and the files that could not be read.
    """
    wanted = {
        "format_version": FORMAT_VERSION,
        "python": sysconfig.get_config_var("py_version"),
        "max_text_bytes": max_text_bytes,
        "max_code_bytes": max_code_bytes,
    }
    marker = storage.join(directory, "COMPLETE.json")
    found = storage.read_if_present(marker)
    if found is not None and (summary := json.loads(found))["made_of"] == wanted:
        return summary
    modules, unreadable = _modules(Path(sysconfig.get_path("stdlib")))
    subsets = _text_subsets(modules, max_text_bytes) | {"the_stack": _capped(_code(modules), max_code_bytes)}
    for name, documents in subsets.items():
        if not documents:
            raise DataError(f"{name}: Python's standard library holds no text for it here; use another Python")
    for name, content in _files(subsets):
        path = storage.join(directory, name)
        if storage.read_if_present(path) != content:  # written again, it would have changed under whoever reads it
            storage.write_durable(path, content)
    summary = {
        "made_of": wanted,
        "documents": {name: len(documents) for name, documents in subsets.items()},
        "bytes": {name: sum(map(_text_bytes, documents)) for name, documents in subsets.items()},
        "unreadable": unreadable,
    }
    storage.write_durable(marker, json.dumps(summary, indent=1).encode())
    return summary


def _modules(library: Path) -> tuple[list[Module], list[str]]:
    """Returns the library's modules in an order that mixes its folders, and the files that are no text."""
    modules, unreadable = [], []
    for file in _python_files(library):
        path = file.relative_to(library).as_posix()
        try:
            raw = file.read_bytes()
            encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            modules.append(Module(path, raw, raw.decode(encoding)))
        except (OSError, SyntaxError, UnicodeDecodeError):
            unreadable.append(path)
    if not modules:
        raise DataError(
            f"{library}: no .py files of Python's standard library (zipped or stripped?); "
            "use a full Python, or give data.sources your own files"
        )
    return sorted(modules, key=lambda module: _digest(module.path)), sorted(unreadable)


def _python_files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir() and entry.name not in _SKIPPED:
            yield from _python_files(entry)


def _text_subsets(modules: list[Module], max_bytes: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the documents of the text subsets; no docstring is in two of them."""
    return {
        "wikipedia": _capped(_topics(), max_bytes // 4),
        "c4": _capped((_c4(*named) for m in modules[::2] for named in _docstrings(m)), max_bytes * 3 // 8),
        "common_crawl": _capped(map(_common_crawl, modules[1::2]), max_bytes * 3 // 8),
    }


def _capped(documents: Iterator[dict[str, Any]], max_bytes: int) -> list[dict[str, Any]]:
    kept, total = [], 0
    for document in documents:
        if size := _text_bytes(document):
            total += size
            if total > max_bytes and kept:
                break
            kept.append(document)
    return kept


def _text_bytes(document: dict[str, Any]) -> int:
    return len((document["text"] if "text" in document else document["content"]).encode())


def _docstrings(module: Module) -> list[tuple[str, str]]:
    """Returns (name, docstring) of a module, its classes and functions; none if it does not parse."""
    try:
        tree = ast.parse(module.raw)
    except (SyntaxError, ValueError):
        return []
    name = module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    named: list[tuple[str, ast.AST]] = [(name, tree)]
    found = []
    for qualified, node in named:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= _MIN_DOCSTRING:
                found.append((qualified, docstring))
            inner = (child for child in node.body if hasattr(child, "name"))
            named.extend((f"{qualified}.{child.name}", child) for child in inner)
    return found


def _topics() -> Iterator[dict[str, Any]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("wikipedia: this Python lacks pydoc_data; use a full Python") from error
    for title, text in sorted(topics.items()):
        url = f"https://docs.python.org/3/reference/{title}"
        meta = {"title": title, "url": url, "language": "en", "timestamp": "20230320"}
        yield {"text": text.strip(), "meta": meta}


def _c4(name: str, docstring: str) -> dict[str, Any]:
    url = f"https://docs.python.org/3/library/{name}"
    meta = {"timestamp": "2019-04-25T12:57:54Z", "url": url, "language": "en", "source": "c4"}
    return {"text": f"{name}\n\n{docstring}", "meta": meta}


def _common_crawl(module: Module) -> dict[str, Any]:
    text = "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in _docstrings(module))
    source = f"cc/{_DUMP}/en_head_0000.json.gz/line{int(_digest(module.path)[:5], 16)}"
    label = {"pred_label": "__label__wiki", "pred_label_prob": 0.9, "wiki_prob": 0.9}
    return {**label, "text": text, "source": source}


def _code(modules: list[Module]) -> Iterator[dict[str, Any]]:
    """Yields rows with The Stack's columns."""
    for module in modules:
        if not module.text.strip():
            continue
        lines = module.text.split("\n")
        row: dict[str, Any] = {
            "hexsha": hashlib.sha1(module.raw).hexdigest(),
            "size": len(module.raw),
            "ext": "py",
            "lang": "Python",
        }
        for event in _EVENTS:
            row |= {
                f"max_{event}_repo_path": f"Lib/{module.path}",
                f"max_{event}_repo_name": "python/cpython",
                f"max_{event}_repo_head_hexsha": hashlib.sha1(module.path.encode()).hexdigest(),
                f"max_{event}_repo_licenses": ["PSF-2.0"],
                f"max_{event}_count": None,
                f"max_{event}_repo_{event}_event_min_datetime": None,
                f"max_{event}_repo_{event}_event_max_datetime": None,
            }
        yield row | {
            "content": module.text,
            "avg_line_length": len(module.text) / len(lines),
            "max_line_length": max(map(len, lines)),
            "alphanum_fraction": sum(map(str.isalnum, module.text)) / len(module.text),
        }


def _stack_schema() -> pa.Schema:
    text, number, share = pa.string(), pa.int64(), pa.float64()
    fields = [("hexsha", text), ("size", number), ("ext", text), ("lang", text)]
    for event in _EVENTS:
        repo = f"max_{event}_repo"
        fields += [(f"{repo}_{part}", text) for part in ("path", "name", "head_hexsha")]
        fields += [(f"{repo}_licenses", pa.list_(text)), (f"max_{event}_count", number)]
        fields += [(f"{repo}_{event}_event_{end}_datetime", text) for end in ("min", "max")]
    fields += [("content", text), ("avg_line_length", share), ("max_line_length", number)]
    return pa.schema([*fields, ("alphanum_fraction", share)])


def _files(subsets: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, bytes]]:
    """Yields the path in the corpus and the content of every file."""
    crawl = f"common_crawl/{_DUMP}/en_head_0000.json.gz.dedup.classifier.jsonl.zst"
    yield "wikipedia/wiki.jsonl", _jsonl(subsets["wikipedia"])
    yield "c4/c4-train.00000-of-00001.jsonl", _jsonl(subsets["c4"])
    yield crawl, zstandard.compress(_jsonl(subsets["common_crawl"]))
    for part in range(_CODE_FILES):
        table = pa.Table.from_pylist(subsets["the_stack"][part::_CODE_FILES], schema=_stack_schema())
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=64)
        yield f"the_stack/data/python/data-{part:05d}-of-{_CODE_FILES:05d}.parquet", file.getvalue()


def _jsonl(documents: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
