"""Plans: what a name of machines means, which ways fit, how long and for how much; literal numbers."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from openmoe.model.config import PRESETS
from openmoe.platform.commands import cli
from openmoe.platform.planner import plan, plan_assumptions, plan_choice, plan_hardware, plan_time, plan_work
from openmoe.platform.planner.plan_assumptions import Preemptions
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError

ROOT = Path(__file__).resolve().parents[3]
ASSUMED = plan_assumptions.load()
QUIET = Preemptions(hours_between=1e9, restart_s=0.0, wait_s=0.0, save_s=0.0)


@pytest.fixture(scope="module")
def run_8b():
    return spec.load("openmoe_8b")


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "slices", "shape"),
    [
        ("v4-8", 4, 1, 1, "2x2x1"),
        ("v4-32", 16, 4, 1, "2x2x4"),
        ("v4-128", 64, 16, 1, "4x4x4"),
        ("v4-256", 128, 32, 1, "4x4x8"),
        ("v5p-64", 32, 8, 1, "2x4x4"),
        ("v5e-8", 8, 1, 1, "2x4"),
        ("v5e-256", 256, 64, 1, "16x16"),
        ("v5litepod-256", 256, 64, 1, "16x16"),
        ("V6E-256", 256, 64, 1, "16x16"),
        ("2xv4-128", 128, 32, 2, "4x4x4"),
        ("v4-1024", 512, 128, 1, "8x8x8"),
        ("h100-8", 8, 1, 1, ""),
        ("a100-16", 16, 2, 2, ""),
    ],
)
def test_a_name_means_chips_hosts_and_slices(name, chips, hosts, slices, shape):
    found = plan_hardware.parse(name)
    assert (found.chips, found.hosts, found.slices, found.shape) == (chips, hosts, slices, shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4-100", "topology: 'v4-100': no slice of v4 has this size; near it are v4-128, v4-64, v4-32, v4-16"),
        ("v9-8", "topology: 'v9-8': expected such as v4-128, 2xv5p-64 or h100-16, of v4, v5e, v5p, v6e, h100, a100"),
        (
            "0xv4-8",
            "topology: '0xv4-8': expected such as v4-128, 2xv5p-64 or h100-16, of v4, v5e, v5p, v6e, h100, a100",
        ),
        ("h100-12", "topology: 'h100-12': h100 come 8 a host; give their number, such as h100-16"),
    ],
)
def test_a_name_of_no_machines_is_refused_with_those_there_are(name, message):
    with pytest.raises(SpecError) as caught:
        plan_hardware.parse(name)
    assert str(caught.value) == message


def test_without_a_name_the_run_files_own_slices_are_planned_for(run_8b):
    [own] = plan.machines_of(run_8b, ())
    assert own == plan_hardware.parse("v5p-128")
    with pytest.raises(SpecError, match="cpu is planned for by name: give --topology, such as v4-128 or h100-16"):
        plan.machines_of(spec.load("quickstart"), ())


@pytest.mark.parametrize(
    ("preset", "name"), [("openmoe-8b", "v4-128"), ("openmoe-8b", "v5p-64"), ("openmoe-34b", "v4-256")]
)
def test_the_large_models_fit_with_the_original_batch_and_what_is_proposed_is_a_run_file(run_8b, preset, name):
    run = run_8b.model_copy(update={"model": PRESETS[preset]})
    assert run.train.batch_rows * run.data.seq_len == 2_097_152
    found = plan.plan(run, plan_hardware.parse(name), ASSUMED, spot=True)
    assert found.way.fits
    proposed = spec.RunSpec.model_validate_json(found.way.spec.model_dump_json())
    assert proposed.mesh.num_devices == found.machines.chips
    assert spec.spec_hash(proposed) == spec.spec_hash(run)


def test_a_way_of_the_run_files_own_that_does_not_fit_is_told_and_replaced(run_8b):
    own = spec.load("openmoe_8b", ["mesh={data: 2, expert: 32}", "execution.remat=none"])
    found = plan.plan(own, plan_hardware.parse("v4-128"), ASSUMED, spot=True)
    assert found.way.fits
    assert not found.own.fits
    mesh = plan.sections(found, ASSUMED, spot=True)[0].facts[1]
    assert re.search(r"the best of \d+ legal ways; the run file's own takes \d+\.\d GiB and does not fit", mesh.note)


def test_the_34b_model_does_not_fit_where_its_state_alone_is_too_much(run_8b):
    run = run_8b.model_copy(update={"model": PRESETS["openmoe-34b"]})
    found = plan.plan(run, plan_hardware.parse("v4-32"), ASSUMED, spot=True)
    assert not any(way.fits for way in found.ways)
    assert found.way.memory_bytes == min(way.memory_bytes for way in found.ways)


def test_between_slices_lies_the_data_axis_alone(run_8b):
    found = plan_choice.ways(run_8b, plan_hardware.parse("2xv4-64"))
    assert found
    assert all(way.spec.mesh.data % 2 == 0 for way in found)


def test_chips_that_whole_groups_cannot_be_divided_over_are_refused(run_8b):
    with pytest.raises(SpecError, match="no mesh of 192 devices holds whole routing groups"):
        plan.plan(run_8b, plan_hardware.parse("v4-384"), ASSUMED, spot=True)


def test_the_work_of_a_step_of_the_8b_model(run_8b):
    """64 devices with 4,096 tokens each in 8 microbatches; blocks are computed twice forward, experts at 62.5 %."""
    work = plan_work.work(run_8b)
    assert work.model_flops == 2_097_152 / 64 * 21_473_390_592
    assert plan_work.expert_places(run_8b.model) == 1.25
    assert work.device_flops / work.model_flops == pytest.approx(1.21, abs=0.01)
    # bfloat16, 2 exchanges forward, 2 forward again, 2 backward; 31 of 32 places are on other devices.
    places = 8 * 4096 * 1.25 * 2048 * 2
    assert work.exchanged_bytes["all-to-all over expert"] == 4 * 6 * places * 31 / 32


def test_a_machine_is_not_assumed_to_be_quicker_than_its_links_or_memory():
    run = spec.load("quickstart", ["train.batch_rows=16"])
    found = plan.plan(run, plan_hardware.parse("v6e-8"), ASSUMED, spot=False)
    assert found.way.bound.limited_by in ("memory", "links")
    assert found.step_s == found.way.bound.step_s


def test_without_preemptions_time_is_work_saves_and_one_start():
    calm = Preemptions(hours_between=3.0, restart_s=100.0, wait_s=900.0, save_s=2.0)
    found = plan_time.outlook(work_s=1000.0, cadence_s=100.0, preemptions=calm, spot=False)
    assert found.wall_s == (1120.0, 1120.0, 1120.0)
    assert found.useful_share == (1000 / 1120,) * 3
    assert found.preemptions == (0, 0, 0)


def test_machines_that_are_never_taken_back_cost_the_same_as_those_that_cannot_be():
    found = plan_time.outlook(work_s=1000.0, cadence_s=100.0, preemptions=QUIET, spot=True)
    assert found.wall_s == (1000.0, 1000.0, 1000.0)


def test_the_time_lost_to_preemptions_is_what_renewal_theory_says():
    """Work in 1,000 h pieces of 0.1 h at one preemption in 2 h: each piece takes (e^(0.1/2) - 1) * 2 h when held."""
    taken = Preemptions(hours_between=2.0, restart_s=0.0, wait_s=3600.0, save_s=0.0)
    found = plan_time.outlook(work_s=3.6e6, cadence_s=360.0, preemptions=taken, spot=True)
    held_h = 1000 * 20 * 0.05127109637602412 / 1.0
    assert found.held_s.median / 3600 == pytest.approx(held_h, rel=0.01)
    assert found.preemptions.median == pytest.approx(held_h / 2, rel=0.03)
    assert found.wall_s.median / 3600 == pytest.approx(held_h * 1.5, rel=0.03)
    assert found.wall_s.low < found.wall_s.median < found.wall_s.high


def test_a_run_that_never_reaches_a_checkpoint_has_no_end():
    taken = Preemptions(hours_between=0.1, restart_s=60.0, wait_s=0.0, save_s=1.0)
    assert plan_time.outlook(work_s=1e6, cadence_s=36_000.0, preemptions=taken, spot=True) is None


@settings(max_examples=30, deadline=None)
@given(work_h=st.floats(0.1, 100), cadence_s=st.floats(60, 3600), hours=st.floats(1, 1000), restart_s=st.floats(0, 600))
def test_an_outlook_is_the_same_each_time_and_never_better_than_the_work(work_h, cadence_s, hours, restart_s):
    taken = Preemptions(hours_between=hours, restart_s=restart_s, wait_s=60.0, save_s=1.0)
    asked = {"work_s": 3600 * work_h, "cadence_s": cadence_s, "preemptions": taken, "spot": True}
    found = plan_time.outlook(**asked)
    assert found == plan_time.outlook(**asked)
    assert 3600 * work_h <= found.held_s.low <= found.held_s.high
    assert found.held_s.low <= found.wall_s.low


def test_prices_are_dated_and_everybodys_own(tmp_path):
    assert re.fullmatch(r"20\d\d-\d\d", ASSUMED.as_of)
    assert ASSUMED.prices.keys() == plan_hardware.CHIPS.keys()
    own = tmp_path / "own.yaml"
    own.write_text(plan_assumptions.SHIPPED.read_text().replace("spot: 1.60", "spot: 0.5"))
    assert plan_assumptions.load(str(own), ["mfu=0.5"]).prices["v4"].spot == 0.5
    with pytest.raises(SpecError, match=r"/gone.yaml: no such file; copy .*/plan_assumptions.yaml and put in your own"):
        plan_assumptions.load("gone.yaml")
    with pytest.raises(SpecError) as caught:
        plan_assumptions.load(str(own), ["mfu=50", "prices.v5.spot=1"])
    assert "mfu: must be <= 1" in str(caught.value)
    assert "prices.v5: no such chip; did you mean `v5p`?" in str(caught.value)


def test_the_command_shows_machines_beside_each_other_and_json():
    asked = ["plan", "openmoe_8b", "--topology", "v4-128", "--topology", "v5p-64"]
    shown = CliRunner().invoke(cli.app, asked)
    assert shown.exit_code == 0, shown.output
    assert "beside each other" in shown.output
    assert "as the run file says" in shown.output
    found = CliRunner().invoke(cli.app, [*asked, "--json", "--on-demand"])
    assert '"preemptions": [\n      0,' in found.output.replace("0.0", "0")


def test_planning_md_is_what_the_command_writes(tmp_path):
    """After a change: openmoe plan openmoe_8b --page docs/planning.md."""
    shipped = (ROOT / "docs" / "planning.md").read_text()
    page = tmp_path / "planning.md"
    result = CliRunner().invoke(cli.app, ["plan", "openmoe_8b", "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert page.read_text().replace(str(page), "docs/planning.md") == shipped
