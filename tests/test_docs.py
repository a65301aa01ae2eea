"""README and docs: links lead somewhere; the files, commands, options and settings that are named are there."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from openmoe.platform.commands import cli
from openmoe.platform.run_file import spec

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RUN_FILES = sorted([*(ROOT / "runs").glob("*.yaml"), *(ROOT / "clusters").glob("*.yaml")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def anchor(heading: str) -> str:
    """As GitHub makes it: lower case, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_inside_the_repository_lead_to_a_file_and_a_heading(page):
    for link in links(page):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            there = [anchor(line) for line in re.findall(r"^#+ (.*)$", without_code(target.read_text()), re.M)]
            assert heading in there, link


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert {name for name in NAMES if name.startswith("docs/")} - linked == set()


def commands(page: Path) -> list[str]:
    """What follows `openmoe` on a line of its own, or between backticks, up to a comment or a second column."""
    text = page.read_text()
    blocks = re.findall(r"^(?:    (?:\$ )?|# )openmoe +([a-z][^#\n]*)", text, re.M)
    spans = re.findall(r"`openmoe +([a-z][^`\n]*)`", text)
    return [re.split(r"   +", found)[0].strip() for found in blocks] + spans


def unknown(words: list[str]) -> str:
    """What of a command line the program does not have, "" if all is known."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        if not words:
            return ""
        if words[0] not in command.commands:
            return words[0]
        command, words = command.commands[words[0]], words[1:]
    options = {"-h", "--help"} | {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return next((word for word in words if word.startswith("-") and word.partition("=")[0] not in options), "")


@pytest.mark.parametrize("page", [*PAGES, *RUN_FILES], ids=lambda page: page.name)
def test_commands_on_a_page_exist_with_their_options(page):
    for line in commands(page):
        assert unknown(shlex.split(line)) == "", line


def settings(page: Path) -> set[str]:
    """Dotted names of settings on a page, between backticks or given to a command."""
    sections = "|".join(spec.RunSpec.model_fields)
    return set(re.findall(rf"[` ]((?:{sections})(?:\.[a-z_]+)+)(?=[`=:])", page.read_text()))


def exists(path: str) -> bool:
    """Whether a run file may have this setting."""
    schema = spec.json_schema()
    nodes = [schema]
    for name in path.split("."):
        found = [node["properties"][name] for node in nodes if name in node.get("properties", {})]
        nodes = found + [schema["$defs"][section] for section in re.findall(r"#/\$defs/(\w+)", json.dumps(found))]
    return bool(nodes)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_on_a_page_exist(page):
    assert {name for name in settings(page) if not exists(name)} == set()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_make_targets_on_a_page_exist(page):
    text = page.read_text()
    folders = "platform|model|pipelines|clusters|runs|benchmarks|tests|docs"
    for path in re.findall(rf"[`\[ ]((?:{folders})/[\w/.-]*\w)[`\] ]", text):
        assert (ROOT / path).exists(), path
    names = {path.name for folder in folders.split("|") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"`([a-z_0-9]+\.py)`", text)) - names == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^ {4}(?:\$ )?)make ([a-z-]+)", text, re.M)) - targets == set()
