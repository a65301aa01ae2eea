"""`openmoe model ablate`: its variants as data, its sums by hand, and real runs of two variants from two seeds."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmoe.model import counts
from openmoe.model.config import DEPARTURES, PRESETS
from openmoe.pipelines import stdlib_corpus
from openmoe.platform.ablations import ablation, ablation_data, ablation_report, ablation_run
from openmoe.platform.ablations.ablation import SCALES, VARIANTS, Outcome, Plan, Summary
from openmoe.platform.ablations.ablation_report import Section
from openmoe.platform.commands import cli, progress
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError

pytestmark = pytest.mark.timeout(180)

DOCS = Path(__file__).parents[3] / "docs"
TINY = replace(SCALES["small"], num_layers=1, moe_every=1, d_model=16, head_dim=8, d_ff=24, num_experts=4)
TINY = replace(TINY, vocab_size=1024, text_vocab_size=724)  # of `few_pieces`


def plan_of(*, seeds=2, tokens=20_480, only=(), base=TINY):
    return Plan(scale="small", base=base, tokens=tokens, seeds=seeds, only=only)


def outcome(variant, seed, loss, *, tokens=20_480, base=TINY):
    settings = ablation.settings_id(ablation.config_of(variant, base), tokens, "rows")
    rest = {"text_loss": loss - 0.5, "drop_fraction": 0.25, "load_cv": 0.5, "tokens_per_s": 1000.0 + seed}
    ids = {"variant": variant, "seed": seed, "settings": settings, "tokens": tokens, "data_id": "rows"}
    return Outcome(**ids, loss=loss, seconds=9.0, device="1 x cpu", **rest)


def test_every_departure_is_set_by_a_variant_of_its_own_and_by_the_combination():
    alone = {name for v in VARIANTS if v != "next" for name in ablation.config_of(v, TINY).departures()}
    assert alone == set(DEPARTURES)
    # Without drops there is no capacity that could count anything.
    assert set(ablation.config_of("next", TINY).departures()) == set(DEPARTURES) - {"capacity_counts_top_k"}


@pytest.mark.parametrize("preset", ["openmoe-next-nano", "openmoe-next-base", "openmoe-next-8b"])
def test_the_combination_has_all_settings_of_the_presets_but_their_sizes(preset):
    for base in SCALES.values():
        ours, theirs = vars(ablation.config_of("next", base)), vars(PRESETS[preset])
        sizes = {"num_layers", "num_heads", "head_dim", "d_model", "d_ff", "d_ff_expert", "num_experts", "top_k"}
        sizes |= {"vocab_size", "text_vocab_size", "group_size", "dtype"}
        assert {name for name in ours if ours[name] != theirs[name]} <= sizes


@pytest.mark.parametrize("scale", SCALES)
def test_the_results_that_are_shipped_are_those_of_today_s_variants(scale):
    found = ablation_run.load_outcomes(str(DOCS / "ablations" / scale))
    (data_id,) = {outcome.data_id for outcome in found.values()}
    plan = Plan(scale=scale, base=SCALES[scale], tokens=1_048_576, seeds=3)
    assert ablation.still_to_run(plan, data_id, found) == []


@pytest.mark.parametrize("scale", SCALES)
def test_as_many_parameters_act_on_a_token_in_every_variant(scale):
    active = {name: counts.active_parameters(ablation.config_of(name, SCALES[scale])) for name in VARIANTS}
    assert active["baseline"] == {"small": 460_480, "100m": 113_304_576}[scale]
    assert [name for name, n in active.items() if abs(n / active["baseline"] - 1) > 0.017] == []


def test_a_variant_changes_what_it_says_and_nothing_else():
    def changed(name):
        config, base = vars(ablation.config_of(name, SCALES["small"])), vars(SCALES["small"])
        return {key: value for key, value in config.items() if value != base[key]}

    assert changed("baseline") == {}
    assert changed("dropless") == {"dropless": True}
    assert changed("swiglu") == {"ffn": "swiglu", "d_ff": 256}
    assert changed("sigmoid") == {"router": "sigmoid", "renormalize_gates": True}
    assert changed("bias-balancing") == {"router_bias_rate": 0.001, "aux_loss_weight": 0.0}
    assert changed("every-layer") == {"moe_every": 1, "d_ff": 128, "num_experts": 6}
    assert changed("fine-grained") == {
        "d_ff_expert": 48,
        "num_experts": 32,
        "top_k": 8,
        "capacity_factor_train": 5.0,
        "capacity_factor_eval": 8.0,
    }


def test_every_variant_has_its_reason_and_the_page_names_it():
    assert all(variant.what and variant.reason for variant in VARIANTS.values())
    page = ablation_report.page([], "ablations")
    assert re.findall(r"^\| `(\S+)` \|", page, re.M) == list(VARIANTS)


@pytest.mark.parametrize(
    ("losses", "baseline", "verdict"),
    [
        ((5.0, 5.1, 5.2), (5.4, 5.5, 5.6), "better"),
        ((5.7, 5.8), (5.4, 5.5), "worse"),
        ((5.0, 5.6), (5.4, 5.5), "within spread"),  # its own seeds differ by more than 0.15
        ((5.40, 5.41), (5.3, 5.6), "within spread"),  # the baseline's do
        ((5.0,), (5.5, 5.6), "one seed"),
        ((5.0, float("nan")), (5.5, 5.6), "diverged"),
    ],
)
def test_a_difference_counts_when_it_is_larger_than_what_seeds_make(losses, baseline, verdict):
    difference = sum(losses) / len(losses) - sum(baseline) / len(baseline)
    assert ablation.verdict(difference, losses, baseline) == verdict


def summaries():
    outcomes = [outcome("baseline", 1, 5.5), outcome("baseline", 0, 5.25), outcome("qk-norm", 0, 5.0)]
    return ablation.summarize([*outcomes, outcome("dropless", 0, 4.5), outcome("dropless", 1, 4.75)], TINY)


def test_outcomes_are_summed_up_by_variant_in_the_table_s_order():
    baseline, dropless, qk_norm = summaries()
    assert dropless == Summary(
        variant="dropless",
        losses=(4.5, 4.75),
        loss=4.625,
        spread=0.25,
        difference=-0.75,
        verdict="better",
        text_loss=4.125,
        drop_fraction=0.25,
        load_cv=0.5,
        tokens_per_s=1000.5,
        active=baseline.active,
        total=baseline.total,
        flops=baseline.flops,
    )
    assert (baseline.losses, baseline.difference, baseline.verdict) == ((5.25, 5.5), None, "")
    assert (qk_norm.loss, qk_norm.difference) == (5.0, None)  # the baseline has other seeds


def test_the_page_has_the_numbers_the_verdicts_and_what_they_do_not_show():
    outcomes = [outcome("baseline", 0, 5.25)]
    sections = [Section(scale, TINY, outcomes, summaries()) for scale in ("small", "100m")]
    sections[1] = sections[1]._replace(base=replace(TINY, num_experts=8))
    page = ablation_report.page(sections, "ablations")
    row = next(line for line in page.splitlines() if line.startswith("| dropless |"))
    assert row.startswith("| dropless | 4.625 | 4.500 to 4.750 (2) | -0.750 | better | 4.125 | 25.0% | 0.50 |")
    assert "- better: `dropless`" in page
    assert "10 steps of 4 rows of 512" in page
    assert page.count("What so small a test cannot show") == 1
    assert "4 experts of width 24 and 8 experts of width 24, with 6 MB" in page
    assert "0.01 in 10 steps at most" in page
    assert "![losses of all seeds](ablations/small.svg)" in page


def test_the_picture_has_a_dot_for_every_seed_that_did_not_diverge():
    diverged = summaries()[0]._replace(variant="swiglu", losses=(5.0, float("nan")))
    root = ElementTree.fromstring(ablation_report.picture([*summaries(), diverged]))
    svg = "{http://www.w3.org/2000/svg}"
    assert [text.text for text in root.iter(f"{svg}text")][-3:] == ["baseline", "dropless", "qk-norm"]
    dots = [(float(dot.get("cx")), dot.get("fill")) for dot in root.iter(f"{svg}circle")]
    assert [colour for _, colour in dots] == ["#444444", "#444444", "#1a7f37", "#1a7f37", "#444444"]
    places = [x for x, _ in dots]
    assert places[2] < places[3] < places[4] < places[0] < places[1]


def test_what_was_done_with_other_settings_is_run_again():
    plan = plan_of(only=("baseline", "dropless"))
    done = {(o.variant, o.seed): o for o in [outcome("baseline", 0, 5.0), outcome("dropless", 1, 5.0)]}
    assert ablation.still_to_run(plan, "rows", done) == [("baseline", 1), ("dropless", 0)]
    everything = [("baseline", 0), ("baseline", 1), ("dropless", 0), ("dropless", 1)]
    assert ablation.still_to_run(plan, "other rows", done) == everything
    assert ablation.still_to_run(replace(plan, tokens=22_528), "rows", done) == everything
    wider = replace(plan, base=replace(TINY, d_ff=48))
    assert ablation.still_to_run(wider, "rows", done) == everything


def test_only_outcomes_of_the_same_tokens_and_of_today_s_variants_are_compared():
    same = [outcome("baseline", 0, 5.0), outcome("dropless", 0, 5.0)]
    longer, stale = outcome("swiglu", 0, 5.0, tokens=40_960), replace(outcome("qk-norm", 0, 5.0), settings="old")
    gone = replace(outcome("qk-norm", 0, 5.0), variant="gone")
    assert ablation.comparable([longer, *same, stale, gone], TINY) == same
    assert ablation.comparable([longer, *same, stale, gone], TINY, (40_960, "rows")) == [longer]
    assert ablation.comparable([], TINY) == []


def test_seeds_order_the_same_rows_and_judge_the_same_last_ones():
    orders = [ablation_run.order_of(40, 4, seed) for seed in (0, 1)]
    for order in orders:
        assert sorted(order.ravel().tolist()) == list(range(40))
        assert sorted(order[-1].tolist()) == [36, 37, 38, 39]
    assert orders[0].tolist() != orders[1].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "droples"], "--only droples: no variant of this name; did you mean `dropless`?"),
        (["--tokens", "5000"], "--tokens 5000: must be a multiple of 2,048, 20,480 at least; take 20480"),
        (["--tokens", "1000000"], "--tokens 1000000: must be a multiple of 2,048, 20,480 at least; take 999424"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = CliRunner().invoke(cli.app, ["model", "ablate", *arguments])
    assert isinstance(result.exception, SpecError)  # which cli.main prints, with exit code 2
    assert str(result.exception) == message


@pytest.fixture(scope="module")
def data(ray_local, few_pieces, tmp_path_factory):
    """A folder with a small corpus, from which the first run builds its rows, with the tokenizer that TINY is for."""
    folder = tmp_path_factory.mktemp("ablations")
    stdlib_corpus.write_corpus(f"{folder}/data/corpus", max_text_bytes=120_000, max_code_bytes=120_000)
    load = spec.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "load", lambda name, overrides: load(name, [*overrides, *few_pieces]))
        yield folder


def test_two_variants_are_run_from_two_seeds_and_never_again(data, monkeypatch):
    monkeypatch.setitem(SCALES, "small", TINY)
    command = ["model", "ablate", "--scale", "small", "--tokens", "20480", "--seeds", "2", "--json"]
    command += ["--only", "baseline", "--only", "renormalized", "--data", f"{data}/data", "--out", f"{data}/found"]
    first = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    found = json.loads(first.stdout)
    assert found["ran"] == 4
    baseline, renormalized = found["variants"]
    assert (baseline["variant"], renormalized["variant"]) == ("baseline", "renormalized")
    assert 5 < renormalized["loss"] < baseline["losses"][0] + 0.5 < 8
    assert len({*baseline["losses"], *renormalized["losses"]}) == 4
    assert 0.3 < baseline["drop_fraction"] < 0.6
    assert "renormalized-1: loss" in first.stderr

    files = sorted(path.name for path in (data / "found/small").iterdir())
    assert files == ["baseline-0.json", "baseline-1.json", "renormalized-0.json", "renormalized-1.json"]
    page = (data / "found.md").read_text()
    assert f"| {baseline['loss']:.3f} |" in page
    assert (data / "found/small.svg").read_text().count("<circle") == 4

    times = {path: path.stat().st_mtime_ns for path in (data / "found/small").iterdir()}
    again = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert json.loads(again.stdout) == {**found, "ran": 0}
    assert "4 of 4 runs are done already" in again.stderr
    assert times == {path: path.stat().st_mtime_ns for path in (data / "found/small").iterdir()}
    assert (data / "found.md").read_text() == page


def test_the_shipped_page_is_what_the_shipped_results_say(tmp_path):
    """After a change to the page: openmoe model ablate, which trains nothing that is there."""
    shutil.copytree(DOCS / "ablations", tmp_path / "ablations")
    found = next(iter(ablation_run.load_outcomes(str(tmp_path / "ablations/small")).values()))
    plan = plan_of(tokens=found.tokens, base=SCALES["small"])
    ablation_run.write_page(str(tmp_path / "ablations"), plan, found.data_id)
    assert (tmp_path / "ablations.md").read_text() == (DOCS / "ablations.md").read_text()


def test_more_tokens_than_the_corpus_has_are_refused_with_their_number(data):
    with progress.ProgressReport() as show, pytest.raises(SpecError, match=r"--tokens 5120000: the corpus has [\d,]+ "):
        ablation_data.rows_of(f"{data}/data", 10_000, show)


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "baseline-0.json").write_text("{}")
    with pytest.raises(SpecError, match=r"baseline-0\.json: no result of an ablation"):
        ablation_run.load_outcomes(str(tmp_path))
