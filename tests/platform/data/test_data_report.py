"""The page about a data build: its numbers are the build's, and it needs nothing but itself."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from openmoe.pipelines import manifest as manifests
from openmoe.pipelines import tokenizer
from openmoe.pipelines.config import DataError
from openmoe.pipelines.mixture import Stage
from openmoe.platform.commands import cli
from openmoe.platform.data import data_figures, data_report

# What of a picture's texts and bars lies outside of it, or is drawn smaller than can be read.
OUTSIDE = """pictures => pictures.flatMap(picture => {
  const frame = picture.getBoundingClientRect();
  return [...picture.querySelectorAll("text, rect")].filter(part => {
    const box = part.getBoundingClientRect();
    const small = part.tagName === "text" && box.height < 9;
    return small || box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 2;
  }).map(part => picture.getAttribute("aria-label") + ": " + (part.textContent || part.getAttribute("class")));
})"""
# How bright text and ground are, from 0 to 765.
INKS = """() => {
  const sum = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b);
  const text = document.querySelector("svg text"), section = text.closest("section");
  return { text: sum(getComputedStyle(text).fill), ground: sum(getComputedStyle(section).backgroundColor) };
}"""


@pytest.fixture(scope="module")
def figures(small_data):
    return data_figures.collect(small_data)


def texts(page, label):
    """The texts of the picture with this label, in order; a picture that is no XML fails."""
    [picture] = re.findall(rf'<svg [^>]*aria-label="{label}">.*?</svg>', page, re.DOTALL)
    return [text.text for text in ElementTree.fromstring(picture).iter("text")]


def boxes(page, label, kind, side="width"):
    """That side of the rectangles of a kind in the picture with this label, in order."""
    [picture] = re.findall(rf'<svg [^>]*aria-label="{label}">.*?</svg>', page, re.DOTALL)
    return [float(r.get(side)) for r in ElementTree.fromstring(picture).iter("rect") if r.get("class") == kind]


def test_document_lengths_are_those_that_the_tokenizer_gives(figures, small_data):
    model = tokenizer.load("builtin:small_8192")
    corpus = Path(small_data.data_dir).parent
    for source in figures.sources:
        lines = (corpus / f"{source.name}.jsonl").read_text().splitlines()
        lengths = [len(ids) for ids in model.encode([json.loads(line)["text"] for line in lines])]
        octaves = [length.bit_length() - 1 for length in lengths]
        expected = [octaves.count(k) for k in range(data_figures.MAX_OCTAVES)]
        tokens = [sum(n for n, o in zip(lengths, octaves, strict=True) if o == k) for k in range(32)]
        assert source.lengths == (expected, tokens, max(lengths), source.units)


def test_octaves_begin_at_powers_of_two():
    lengths = np.asarray([1, 2, 3, 4, 7, 8, 1023, 1024, 2**31 - 1])
    assert data_figures.octave_of(lengths).tolist() == [0, 1, 1, 2, 2, 3, 9, 10, 30]


def test_of_many_units_some_are_measured_at_equal_distances_and_the_page_says_so(figures):
    assert data_figures._spread(5) == [0, 1, 2, 3, 4]
    spread = data_figures._spread(1000)
    assert (len(spread), spread[0], spread[-1]) == (32, 0, 999)
    assert set(np.diff(spread).tolist()) == {32, 33}
    [wiki, *others] = figures.sources
    page = data_report.page(figures._replace(sources=[wiki._replace(units=1000), *others]))
    assert "; of 5 of 1,000 units</p>" in page
    assert "units</p>" not in data_report.page(figures)


def test_the_mixture_is_drawn_as_got_and_as_asked_for(figures, small_data):
    [stage] = figures.stages
    located = small_data.mixture.locate(0, stage.end).stream
    assert [share.rows for share in stage.shares] == np.bincount(located).tolist()
    assert [share.wanted for share in stage.shares] == [0.75, 0.25]
    label = f"shares of the rows of rows 0 to {stage.end - 1}"
    wiki = stage.shares[0].rows
    page = data_report.page(figures)
    assert texts(page, label)[:2] == ["wiki", f"{wiki / stage.end:.2%} of 75.00%, {wiki} rows"]
    scale = 300 / max(wiki / stage.end, 0.75)
    assert np.allclose(boxes(page, label, "bar"), [share.rows / stage.end * scale for share in stage.shares], atol=0.06)
    assert np.allclose(boxes(page, label, "wanted", "x"), [199 + 0.75 * scale, 199 + 0.25 * scale], atol=0.06)


def test_each_stage_has_a_mixture_of_its_own_as_far_as_rows_reach(small_data):
    staged = replace(small_data, stages=(Stage(40, (1.0, 3.0)), Stage(100, (3.0, 1.0)), Stage(10**6, (0.0, 1.0))))
    first, second, third = data_figures._stages(staged, 130)
    assert (first.first, first.end, second.first, second.end, third.end) == (0, 40, 40, 100, 130)
    assert [sum(share.rows for share in stage.shares) for stage in (first, second, third)] == [40, 60, 30]
    assert [(share.stream, share.wanted, share.rows) for share in third.shares] == [("code", 1.0, 30)]
    assert len(data_figures._stages(staged, 100)) == 2


def test_fill_loss_and_denoisers_are_those_of_the_receipts(figures, small_data):
    page = data_report.page(figures)
    groups = [
        json.loads(path.read_text()) for path in sorted(Path(small_data.data_dir).glob("passes/wiki-*/0000/0*.json"))
    ]
    slots = 128 * sum(group["rows"] for group in groups)
    fill, loss = (sum(group[key] for group in groups) / slots for key in ("slots_used", "loss_slots"))
    label = "used slots of the rows of each stream"
    assert texts(page, label)[:2] == ["wiki", f"{fill:.2%} used, {loss:.1%} loss"]
    width = 300
    parts = [boxes(page, label, kind)[0] for kind in ("bar", "second", "none")]
    assert np.allclose(parts, [loss * width, (fill - loss) * width, (1 - fill) * width], atol=0.06)
    pieces = {name: sum(group["pieces"][name] for group in groups) for name in groups[0]["pieces"]}
    drawn = texts(page, "denoisers of wiki")
    assert drawn[::2] == ["R3", "R8", "X3", "X8", "X64", "S"]
    assert drawn[1::2] == [
        f"{count / sum(pieces.values()):.1%} of {asked}%"
        for count, asked in zip(pieces.values(), (10, 10, 10, 10, 10, 50), strict=True)
    ]


@pytest.mark.parametrize(("objective", "shares"), [("prefix_lm", {"S": 1.0}), ("next_token", {"next_token": 1.0})])
def test_other_objectives_want_one_kind_of_piece(objective, shares):
    assert data_figures.wanted_denoisers(objective) == shares


def test_what_was_left_out_is_named_by_reason(figures):
    left = {
        "bad": {"bad_json": 3, "empty": 1},
        "duplicates": 7,
        "validation": 5,
        "quarantined": ["a<b>.jsonl [0, 9): died"],
    }
    page = data_report.page(figures._replace(sources=[figures.sources[0]._replace(**left), *figures.sources[1:]]))
    assert texts(page, "unusable documents by reason") == ["wiki: bad_json", "3", "wiki: empty", "1"]
    cells = re.findall(r"<td [^>]*>([^<]*)</td>", page[page.index("What was left out?") :])
    assert cells[:8] == ["wiki", "40", "7", "5", "4", "0", "5", "1"]
    assert "<pre>wiki: a&lt;b&gt;.jsonl [0, 9): died</pre>" in page


def test_a_build_of_which_nothing_is_packed_has_a_page_too(figures):
    empty = [stream._replace(rows=0, denoisers={}, fill=0.0, loss=0.0) for stream in figures.streams]
    page = data_report.page(figures._replace(rows=0, stages=[], streams=empty))
    assert "No row can be read yet" in page
    assert page.count("nothing is packed") == 4


def test_a_unit_that_is_cut_off_is_one_line_with_the_remedy(small_data, tmp_path):
    shutil.copytree(small_data.data_dir, tmp_path / "data")
    unit = tmp_path / "data/tokens" / f"{small_data.sources[0].units[0]['key']}.parquet"
    unit.write_bytes(unit.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"^{unit}: damaged \(.*\); `openmoe data audit` says what else is$"):
        data_figures.collect(manifests.load(str(next((tmp_path / "data/manifests").iterdir()))))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_in_a_browser_all_pictures_are_there_with_their_numbers_and_nothing_sticks_out(
    figures, browse, tmp_path, width, scheme
):
    hostile = "<img src=x onerror=1>" * 9
    wiki = figures.sources[0]._replace(bad={"bad_json": 3}, quarantined=[f"{hostile} [0, 9): died"])
    path = tmp_path / "page.html"
    path.write_text(data_report.page(figures._replace(sources=[wiki, *figures.sources[1:]])))
    page = browse(f"file://{path}", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("svg[aria-label]")
    assert pictures.count() == len(re.findall(r"<svg [^>]*aria-label", path.read_text())) >= 7
    outside = pictures.evaluate_all(OUTSIDE)
    assert outside == []
    assert page.locator("svg text:visible").count() == page.locator("svg text").count() > 30
    [stage] = figures.stages
    rows = f"{stage.shares[0].rows / stage.end:.2%} of 75.00%, {stage.shares[0].rows} rows"
    assert page.get_by_text(rows, exact=True).is_visible()
    assert page.locator("img").count() == 0
    inks = page.evaluate(INKS)
    assert (inks["text"] > inks["ground"]) == (scheme == "dark")
    assert abs(inks["text"] - inks["ground"]) > 300  # of 765: easy to read


def test_the_command_writes_one_file_that_asks_for_nothing(small_data, tmp_path):
    out = tmp_path / "page.html"
    command = ["data", "report", small_data.path, "-o", str(out)]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    page = out.read_text()
    assert f"<h1>data {small_data.data_id[:16]}</h1>" in page
    assert small_data.path in page
    for asked in ("http", "<script", "src=", "url(", "@import"):
        assert asked not in page


def test_the_figures_of_the_page_are_to_be_had_as_json(figures, small_data):
    result = CliRunner().invoke(cli.app, ["data", "report", small_data.path, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert (found["data_id"], found["manifest"], found["rows"]) == (
        small_data.data_id,
        small_data.path,
        figures.rows,
    )
    assert found["sources"][0]["lengths"]["longest"] == figures.sources[0].lengths.longest
    assert found["streams"][0]["wanted_denoisers"] == {"R3": 0.1, "R8": 0.1, "X3": 0.1, "X8": 0.1, "X64": 0.1, "S": 0.5}
    assert found["stages"][0]["shares"][0]["wanted"] == 0.75
