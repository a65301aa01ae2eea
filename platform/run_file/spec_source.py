"""A run file or cluster file as it was written: settings not yet checked, and the place where each was given."""

import importlib.resources
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from openmoe.platform.run_file import spec_yaml
from openmoe.platform.run_file.spec_errors import Problem, SpecError, did_you_mean, join, show


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of settings file.

    Attributes:
      noun: as messages call it.
      package: where the shipped ones are.
      example: a shipped one to start from.
      override: an example of an override.
      if_missing: what to do then, where no shipped one can be named.
    """

    noun: str
    package: str
    example: str
    override: str
    if_missing: str = ""

    def shipped(self) -> list[str]:
        """Names of the files of this kind that come with the package."""
        files = importlib.resources.files(self.package).iterdir()
        return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


RUN_FILE = Kind(noun="run file", package="openmoe.runs", example="runs/quickstart.yaml", override="train.steps=200")
CLUSTER_FILE = Kind(noun="cluster file", package="openmoe.clusters", example="clusters/local.yaml", override="slices=2")


@dataclass(kw_only=True)
class Source:
    """Settings of one file, with the overrides that were laid over it.

    Attributes:
      kind: what the file is to be.
      where: the file, as messages name it.
      values: the settings, plain data.
      origins: by dotted path, where it was written: "runs/a.yaml:12" or "override".
      problems: of spelling; what the settings mean is checked elsewhere.
    """

    kind: Kind
    where: str
    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[Problem] = field(default_factory=list)

    def override(self, text: str) -> None:
        """Sets one "key.path=value", the value in YAML; unknown keys are left to the checks that follow."""
        path, _, value = text.partition("=")
        if not all(path.split(".")) or not value.strip():
            message = f"override {show(text)}: expected key.path=value, such as {self.kind.override}"
            self.problems.append(Problem("", message))
            return
        try:
            document = spec_yaml.Document(value)
        except spec_yaml.UnreadableError as error:
            self.problems.append(Problem("", f"override {show(text)}: {error}"))
            return
        self.problems += [Problem(join(path, place), message) for place, message in document.problems]
        if problem := self._set(path, document.value):
            self.problems.append(Problem(path, problem))

    def _set(self, path: str, value: spec_yaml.Value) -> str | None:
        """Sets the value at `path`, adding the sections on the way; returns why it cannot."""
        node: Any = self.values
        *parents, last = path.split(".")
        place = ""
        for key in parents:
            if problem := _no_slot(node, key, place):
                return problem
            if isinstance(node, dict):
                node.setdefault(key, {})
            place = join(place, key)
            self.origins.setdefault(place, "override")
            node = node[_slot(node, key)]
        if problem := _no_slot(node, last, place):
            return problem
        node[_slot(node, last)] = value
        self.origins = {old: at for old, at in self.origins.items() if not old.startswith(f"{path}.")}
        self.origins[path] = "override"
        return None


def _no_slot(node: Any, key: str, place: str) -> str | None:
    match node:
        case dict():
            return None
        case list() if key.isdecimal() and int(key) < len(node):
            return None
        case list():
            return f"`{place}` has no entry {key}; it has {len(node)}, counted from 0"
    return f"`{place}` is {show(node)}, nothing lies below it; set `{place}` itself"


def _slot(node: dict[str, Any] | list[Any], key: str) -> str | int:
    return int(key) if isinstance(node, list) else key


def read(path_or_name: str, kind: Kind) -> Source:
    """Reads a file of settings.

    Args:
      path_or_name: a path (it has a `/` or ends in .yaml), or the bare name of a shipped file.
      kind: what the file is to be.

    Raises:
      SpecError: it is not there, or not one YAML mapping; nothing more can be said about it then.
    """
    is_path = "/" in path_or_name or path_or_name.endswith((".yaml", ".yml"))
    if not is_path and path_or_name not in kind.shipped():
        hint = did_you_mean(path_or_name, kind.shipped())
        raise SpecError([Problem("", f"no {kind.noun} of this name is shipped; {hint}")], path_or_name)
    file = Path(path_or_name) if is_path else importlib.resources.files(kind.package) / f"{path_or_name}.yaml"
    where = path_or_name if is_path else str(file)
    return _parse(_text(file, where, kind), where, kind)


def _parse(text: str, where: str, kind: Kind) -> Source:
    try:
        document = spec_yaml.Document(text)
    except spec_yaml.UnreadableError as error:
        raise SpecError([Problem("", str(error))], f"{where}:{error.line}" if error.line else where) from error
    if not isinstance(document.value, dict):
        problem = f"a {kind.noun} is a mapping of settings, this is {show(document.value)}"
        raise SpecError([Problem("", f"{problem}; start from {kind.example}")], where)
    origins = {path: f"{where}:{line}" for path, line in document.lines.items() if path}
    return Source(kind=kind, where=where, values=document.value, origins=origins, problems=document.problems)


def _text(file: Path | Traversable, where: str, kind: Kind) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(spec_yaml.MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = kind.if_missing or f"give its path, or a shipped name ({', '.join(kind.shipped())})"
        raise SpecError([Problem("", f"no such file; {remedy}")], where) from error
    except IsADirectoryError as error:  # mostly a run directory, where the run file was asked for
        raise SpecError(
            [Problem("", f"a folder, not a {kind.noun}; give a file such as {kind.example}")], where
        ) from error
    except OSError as error:
        raise SpecError([Problem("", f"cannot be read: {error.strerror}")], where) from error
    if len(content) > spec_yaml.MAX_BYTES:
        message = f"larger than {spec_yaml.MAX_BYTES} bytes; a {kind.noun} is a page of settings, not data"
        raise SpecError([Problem("", message)], where)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte {error.start} is {content[error.start]:#04x}); save it as UTF-8"
        raise SpecError([Problem("", message)], where) from error
