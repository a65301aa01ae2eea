"""Run files and cluster files as text: the part of YAML that every YAML version reads alike, and nothing else.

YAML 1.1 (PyYAML) and 1.2 (editors, Go, JavaScript) disagree about plain words such as `no`, `1e6`, `017` or
`1:30`; a run whose batch size depends on the reader is not an account of anything. So an ambiguous word is
refused with the spelling that has one meaning. Anchors, aliases, tags and merge keys are refused as well:
a file says each thing once, and an alias bomb has nothing to expand.
"""

import math
import re
from collections.abc import Iterator
from typing import TypeAlias

import yaml

from openmoe.platform.run_file.spec_errors import Problem, join, show

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"

MAX_BYTES = 1_000_000
MAX_DEPTH = 12

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"([-+]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_GROUPED = re.compile(r"[-+]?[0-9][0-9_,]*_[0-9_]*(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0o?[0-7]+")
_HEX_OR_BINARY = re.compile(r"[-+]?0(x[0-9a-fA-F]+|b[01]+)")
_BASE_60 = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}

# libyaml where PyYAML was built with it: a file of MAX_BYTES then parses in under a second instead of twenty.
_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class UnreadableError(ValueError):
    """The text is not one YAML document, so that nothing else can be said about it."""

    def __init__(self, message: str, line: int | None = None):
        self.line = line
        super().__init__(message)


class Document:
    """A parsed text: `value`, the line (from 1) of each dotted path, and the problems met on the way."""

    def __init__(self, text: str):
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []
        self._events = _events(text)
        first = next(self._events, None)
        self.value = None if first is None else self._read(first, "", depth=0)
        if (extra := next(self._events, None)) is not None:
            raise UnreadableError("more than one document (`---`); keep one", _line(extra))

    def _read(self, event: yaml.Event, path: str, depth: int) -> Value:
        self.lines[path] = _line(event)
        if depth > MAX_DEPTH:
            raise UnreadableError(f"{path[:60]}: nested deeper than {MAX_DEPTH} levels", _line(event))
        match event:
            case yaml.ScalarEvent():
                return self._scalar(event, path)
            case yaml.SequenceStartEvent():
                return self._sequence(path, depth)
            case _:
                return self._mapping(path, depth)

    def _scalar(self, event: yaml.ScalarEvent, path: str) -> Value:
        if not event.implicit[0]:
            return event.value
        value, problem = plain_scalar(event.value)
        if problem:
            self.problems.append(Problem(path, problem))
        return value

    def _sequence(self, path: str, depth: int) -> list[Value]:
        items: list[Value] = []
        for event in self._until(yaml.SequenceEndEvent):
            items.append(self._read(event, join(path, len(items)), depth + 1))
        return items

    def _mapping(self, path: str, depth: int) -> dict[str, Value]:
        items: dict[str, Value] = {}
        for event in self._until(yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise UnreadableError(f"{path or 'the file'}: a key must be a word", _line(event))
            key, place = event.value, join(path, event.value)
            if event.implicit[0] and (problem := plain_scalar(key)[1]):
                self.problems.append(Problem(place, f"as a key, {problem}"))
            elif key in items:
                first, second = self.lines[place], _line(event)
                self.problems.append(Problem(place, f"given twice (lines {first} and {second}); keep one"))
            items[key] = self._read(next(self._events), place, depth + 1)
            self.lines[place] = _line(event)
        return items

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event


def _events(text: str) -> Iterator[yaml.Event]:
    """Parser events of the content, stream and document marks left out; refuses anchors, aliases and tags."""
    try:
        for event in yaml.parse(text, Loader=_Loader):
            match event:
                case yaml.AliasEvent(anchor=name):
                    raise UnreadableError(f"aliases are not allowed; write out what `*{name}` stands for", _line(event))
                case yaml.NodeEvent(anchor=str(name)):
                    raise UnreadableError(f"anchors are not allowed; remove `&{name}`", _line(event))
                case yaml.ScalarEvent(tag=str(tag)) | yaml.CollectionStartEvent(tag=str(tag)):
                    raise UnreadableError(f"tags are not allowed; remove `{tag}`", _line(event))
                case yaml.NodeEvent() | yaml.CollectionEndEvent():
                    yield event
    except yaml.YAMLError as error:
        raise _syntax_error(text, error) from error


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None, "events of a parser carry their place"
    return event.start_mark.line + 1


def _syntax_error(text: str, error: yaml.YAMLError) -> UnreadableError:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return UnreadableError(f"not readable as YAML: {str(error).splitlines()[0]}")
    line = error.problem_mark.line
    rows = text.splitlines()
    if line < len(rows) and "\t" in rows[line][: -len(rows[line].lstrip()) or None]:
        return UnreadableError("a tab in the indentation; YAML allows spaces only", line + 1)
    return UnreadableError(f"not YAML: {error.problem}; look at this line and the one before", line + 1)


def plain_scalar(text: str) -> tuple[Value, str | None]:
    """Meaning of an unquoted word, and what is wrong with it when YAML readers disagree about it.

    Returns:
      (value, None) or (text, problem), the problem naming the word and the spelling that has one meaning.
    """
    match text:
        case "" | "null" | "~":
            return None, None
        case "true" | "false":
            return text == "true", None
    if _INT.fullmatch(text):
        return int(text), None
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text), None
    trap = _trap(text)
    return text, f"{trap}, or '{text}' in quotes for text" if trap else None


def _trap(text: str) -> str | None:
    if meaning := _BOOLEANS.get(text.lower()):
        return f"YAML 1.1 reads {text} as {meaning}; write {meaning} for a boolean"
    if text in ("True", "TRUE", "False", "FALSE", "Null", "NULL"):
        return f"{text} is not spelt alike everywhere; write {text.lower()}"
    if _OCTAL.fullmatch(text):
        digits = text.replace("0o", "", 1)
        return f"{text} is {int(digits, 8)} to some YAML readers and {int(digits)} to others; write either"
    if _EXPONENT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            return f"{show(text)} is too large a number; write a smaller one"
        return f"{show(text)} is text in YAML 1.1; write {number(value)}"
    if _GROUPED.fullmatch(text):
        return f"{text} is text to some YAML readers; write {text.replace('_', '')}"
    if _HEX_OR_BINARY.fullmatch(text):
        return f"{text} is text to some YAML readers; write {int(text, 0)}"
    if _BASE_60.fullmatch(text):
        return f"YAML 1.1 reads {text} as a base-60 number; write the number in the key's unit"
    if _DATE.fullmatch(text):
        return f"YAML 1.1 reads {text} as a date; no field is a date"
    if _NOT_FINITE.fullmatch(text):
        return f"{text} is not a finite number; write a finite one"
    if text in ("<<", "=", "!", "&", "*"):
        return f"{text} has a meaning of its own to some YAML readers; write the keys out"
    return None


def number(value: float) -> str:
    """A float as every YAML version reads it back: 1000000, 0.5, 1.0e-05."""
    if value % 1 == 0 and abs(value) < 1e15:
        return str(int(value))
    mantissa, mark, exponent = repr(value).partition("e")
    return (mantissa if "." in mantissa else mantissa + ".0") + mark + exponent


class _Dumper(yaml.SafeDumper):
    """Writes what `Document` reads back: no aliases, and quotes around words that are not plainly text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() and plain_scalar(text) == (text, None) else '"'
    if "\n" in text and text.replace("\n", "").isprintable():
        style = "|"  # one line stays one line; where this cannot hold the text, PyYAML falls back to quotes
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(value: Value) -> str:
    """The YAML text of plain data, keys in their given order, one line a scalar."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
