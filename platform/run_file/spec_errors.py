"""What is wrong with a run file: one line a problem, each with dotted path, value, bound and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_SHOWN = 20


class Problem(NamedTuple):
    """One thing to change: where in the run file (dotted path, "" for the whole file), and why and how."""

    path: str
    message: str


class SpecError(ValueError):
    """A run file or override that cannot be used; `problems` holds every reason found.

    Args:
      problems: at least one.
      where: the run file, as the user named it.
      origins: where a dotted path was written ("runs/a.yaml:12", "override"), for those that were.
    """

    def __init__(self, problems: Sequence[Problem], where: str = "", origins: Mapping[str, str] | None = None):
        self.problems = tuple(problems)
        lines = [_one_line(problem, where, origins or {}) for problem in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            lines.append(f"{where}: and {len(self.problems) - MAX_SHOWN} problems more")
        super().__init__("\n".join(lines))


def _one_line(problem: Problem, where: str, origins: Mapping[str, str]) -> str:
    written, origin = problem.path, where
    while written and written not in origins:
        written = written.rpartition(".")[0]
    if written:
        origin = origins[written]
    return ": ".join(part for part in (origin, problem.path, problem.message) if part)


def join(path: str, key: str | int) -> str:
    """Dotted path of what lies below `path`: join("data.sources", 0) is "data.sources.0"; "" is the file."""
    return ".".join(part for part in (path, str(key)) if part)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word as a question, or every known word when none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean `{near[0]}`?" if near else "known: " + ", ".join(names)


def show(value: object) -> str:
    """A value as an error message quotes it: YAML's words for None and booleans, long ones cut."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case list():
            return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dataclass_type": "a mapping",
    "model_type": "a mapping",
}
_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def problems_of(error: ValidationError, schema: Mapping[str, Any]) -> list[Problem]:
    """Pydantic's errors in our words.

    Args:
      error: what validation of a whole run file raised.
      schema: JSON Schema of the run file, for the keys that are known at each place.
    """
    return [problem for details in error.errors() for problem in _translate(details, schema)]


def _translate(details: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Problem]:
    location, value, kind = details["loc"], details["input"], details["type"]
    path = ".".join(map(str, _as_written(schema, location)))
    match kind:
        case "default_factory_not_called":
            return []  # the field it derives from has its own problem
        case "extra_forbidden" | "unexpected_keyword_argument":
            message = f"unknown key; {did_you_mean(location[-1], _keys_at(schema, location[:-1]))}"
        case "missing":
            section = f"`{'.'.join(map(str, location[:-1]))}`" if location[1:] else "the file"
            message = f"missing; add `{location[-1]}:` to {section}"
        case "literal_error":
            message = _not_a_choice(details["ctx"]["expected"], value)
        case "union_tag_invalid":
            path = join(path, details["ctx"]["discriminator"].strip("'"))
            message = _not_a_choice(details["ctx"]["expected_tags"], details["ctx"]["tag"])
        case "value_error":
            return _from_validator(path, details["ctx"]["error"])
        case _ if kind in _EXPECTED:
            message = f"expected {_EXPECTED[kind]}, got {show(value)}{_type_remedy(kind, value)}"
        case _ if kind in _BOUNDS:
            sign, bound = _BOUNDS[kind]
            message = f"must be {sign} {details['ctx'][bound]}, got {show(value)}"
        case "string_pattern_mismatch":
            examples = _node_at(schema, location).get("examples", ())
            message = "; such as ".join((f"must match {details['ctx']['pattern']}, got {show(value)}", *examples))
        case _:
            message = f"{details['msg']}, got {show(value)}"
    return [Problem(path, message)]


def _not_a_choice(expected: str, value: object) -> str:
    choices = expected.replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(str(value), choices, n=1)
    remedy = f"; did you mean `{near[0]}`?" if near else ""
    return f"must be one of {', '.join(choices)}; got {show(value)}{remedy}"


def _from_validator(path: str, error: ValueError) -> list[Problem]:
    """Our own checks name their field first ("top_k: ..."), so that it joins the path of its section."""
    if problems := getattr(error, "problems", ()):
        return [Problem(join(path, place), message) for place, message in problems]
    field, colon, message = str(error).partition(": ")
    if colon and all(part.isidentifier() or part.isdecimal() for part in field.split(".")):
        return [Problem(join(path, field), message)]
    return [Problem(path, str(error))]


def _type_remedy(kind: str, value: object) -> str:
    match kind, value:
        case "tuple_type", str():
            return f"; write [{value}]"
        case "int_type" | "float_type", str() if _is_number(value):
            return f"; take the quotes off: {value}"
        case "int_type", float() if value.is_integer():
            return f"; write {int(value)}"
        case "string_type", bool() | int() | float():
            return f'; write it in quotes: "{show(value)}"'
        case "dataclass_type" | "model_type", _:
            return "; indent its keys below it"
        case _, None:
            return "; write a value after the colon"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _keys_at(schema: Mapping[str, Any], location: Sequence[str | int]) -> list[str]:
    """Keys that the schema knows at a place of the file."""
    return list(_node_at(schema, location)["properties"])


def _node_at(schema: Mapping[str, Any], location: Sequence[str | int]) -> Mapping[str, Any]:
    node = schema
    for key in location:
        node = _below(schema, node, key)
    return node


def _as_written(schema: Mapping[str, Any], location: Sequence[str | int]) -> Iterator[str | int]:
    """Yields a location without the choice that pydantic names between a section that has several and its keys."""
    node = schema
    for key in location:
        if "discriminator" not in node:
            yield key
        node = _below(schema, node, key)


def _below(schema: Mapping[str, Any], node: Mapping[str, Any], key: str | int) -> Mapping[str, Any]:
    """Returns the schema of what has this key, or is this choice; empty where it says nothing about it."""
    if "discriminator" in node:
        node = {"$ref": node["discriminator"]["mapping"].get(key, "")}
    else:
        node = node.get("items", {}) if isinstance(key, int) else node.get("properties", {}).get(key, {})
    return schema["$defs"].get(node["$ref"].rpartition("/")[2], {}) if "$ref" in node else node
