"""The loop of one incarnation, on virtual devices of this process: records, checkpoints, resume, and its refusals."""

import itertools
import json
import re
import shutil
import statistics
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from openmoe.model import checksum
from openmoe.pipelines import build, stdlib_corpus, storage
from openmoe.pipelines.loader import Loader
from openmoe.pipelines.storage import StorageError
from openmoe.platform.commands import cli
from openmoe.platform.run import journal, ledger, ledger_data, report
from openmoe.platform.run.ledger_data import Comparison
from openmoe.platform.run.lineage import Position
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError
from openmoe.platform.train import cadence, health, replay
from openmoe.platform.train.cadence import NOTHING_SEEN, Seen
from openmoe.platform.train.health import NonFiniteLoss
from openmoe.platform.train.restore import DamagedCheckpoint
from openmoe.platform.train.saver import Superseded

pytestmark = pytest.mark.timeout(180)

SMALL = (
    *("model.num_layers=2", "model.d_model=32", "model.d_ff=32", "model.head_dim=8", "model.group_size=128"),
    *("data.seq_len=128", "train.steps=6", "train.batch_rows=8", "train.checkpoint_every_steps=2"),
    *("train.sample_tokens=0", "mesh.expert=8", "cluster.num_workers=1", "cluster.devices_per_worker=8"),
)


@pytest.fixture(scope="module")
def data(ray_local, few_pieces, tmp_path_factory):
    """(overrides that name a small corpus, the manifest built from it)."""
    folder = tmp_path_factory.mktemp("data")
    stdlib_corpus.write_corpus(f"{folder}/corpus", max_text_bytes=60_000, max_code_bytes=60_000)
    overrides = [*few_pieces, f"data_dir={folder}/data"]
    globs = ("wikipedia/*.jsonl", "c4/*.jsonl", "common_crawl/*/*.zst", "the_stack/data/*/*.parquet")
    overrides += [f"data.sources.{i}.paths=[{folder}/corpus/{glob}]" for i, glob in enumerate(globs)]
    loaded = spec.load("quickstart", [*SMALL, *overrides])
    return overrides, build.build(loaded.data, loaded.data_dir, min_rows=64)


@pytest.fixture
def train(data, tmp_path):
    """Trains one incarnation in `tmp_path/name`; returns its RunDir."""
    from openmoe.platform.train import train_loop

    overrides, manifest = data

    def run(name, *more, report=lambda record: None, seen=NOTHING_SEEN):
        loaded = spec.load("quickstart", [*SMALL, *overrides, f"run_dir={tmp_path}/{name}", *more])
        run_dir = RunDir(loaded.run_dir)
        run_dir.create(loaded)
        train_loop.train(loaded, run_dir, run_dir.claim(), manifest.path, report, seen=seen)
        return run_dir

    return run


def bits(run):
    return [(r["step"], r["rows"], r["batch_checksum"], r["loss"].hex(), r["grad_norm"].hex()) for r in run.trace()]


def test_an_incarnation_reads_every_row_once_and_accepts_its_checkpoints(train):
    seen = []
    run = train("a", "train.sample_tokens=4", report=lambda record: seen.append(record["step"]))
    assert seen == [1, 2, 3, 4, 5, 6]
    assert [r["rows"] for r in run.trace()] == [[8 * s, 8 * s + 8] for s in range(6)]
    assert [(a.number, a.step, a.next_row) for a in run.acceptances()] == [(1, 2, 16), (2, 4, 32), (3, 6, 48)]
    [sampled] = [e for e in run.events() if e["event"] == "sampled"]
    assert [len(pair) for pair in sampled["samples"]] == [2, 2, 2, 2]


def test_a_finished_run_leaves_its_result_and_a_page_that_needs_no_server(train, data):
    run = train("a")
    loaded = spec.load("quickstart", [*SMALL, *data[0], f"run_dir={run.path}"])
    result = report.finish(loaded, run, data[1].path)
    assert run.finished()["steps"] == 6
    assert result.tokens == 6 * 8 * 128
    assert result.loss == statistics.fmean(r["text_loss"] for r in run.trace())
    assert 4 < result.unigram_entropy < 6
    with open(run.at("summary.html")) as file:
        page = file.read()
    shown = json.loads(re.search(r'<script type="application/json" id="snapshot">(.*)</script>', page)[1])
    assert shown["curves"]["line"]["step"] == [1, 2, 3, 4, 5, 6]
    percent_of_even = [[[round(800 * share) for share in layer] for layer in r["expert_load"]] for r in run.trace()]
    assert [(len(layers), len(layers[0])) for layers in percent_of_even] == [(1, 8)] * 6
    assert shown["load"] == {"width": 1, "columns": [[step, load] for step, load in enumerate(percent_of_even)]}
    assert not re.search(r"(src|href)=.https?:", page)


def test_a_second_incarnation_goes_on_with_the_next_row_and_the_same_bits_and_curves(train, curves):
    whole = train("whole")
    train("parts", "train.steps=4")
    parts = train("parts")
    assert [(c.incarnation, c.resumes) for c in parts.claims()] == [(1, 0), (2, 2)]
    assert bits(parts) == bits(whole)
    assert parts.acceptances()[-1].ledger_head == whole.acceptances()[-1].ledger_head
    assert parts.acceptances()[-1].digest == whole.acceptances()[-1].digest
    drawn, trace = curves(parts.at("tensorboard")), whole.trace()
    assert drawn["loss/cross_entropy"] == {r["step"]: r["loss"] for r in trace}
    assert drawn["optimizer/grad_norm"] == {r["step"]: r["grad_norm"] for r in trace}
    assert drawn["expert_load/layer_0_largest"] == {r["step"]: max(r["expert_load"][0]) for r in trace}


def test_a_run_goes_on_however_it_is_carried_out_with_the_same_rows_and_losses_to_1e_4(train):
    scanned = ("execution.scan_blocks=true", "execution.remat=full", "mesh={fsdp: 2, expert: 2, tensor: 2}")
    whole = train("whole")
    train("parts", "train.steps=4", *scanned)
    parts = train("parts")
    assert parts.claims()[-1].resumes == 2
    assert [(r["step"], r["rows"], r["batch_checksum"]) for r in parts.trace()] == [row[:3] for row in bits(whole)]
    assert [r["loss"] for r in parts.trace()] == pytest.approx([r["loss"] for r in whole.trace()], rel=1e-4)


def test_every_record_up_to_a_checkpoint_is_durable_before_it_is_accepted(train, monkeypatch):
    accept, recorded = RunDir.accept, []

    def watch(self, acceptance):
        entries = [record["step"] for _, _, record in journal.read(self.at("ledger"))]
        recorded.append((acceptance.step, [r["step"] for r in self.trace()], entries))
        return accept(self, acceptance)

    monkeypatch.setattr(RunDir, "accept", watch)
    train("a")
    for step, *kept in recorded:
        assert [steps[:step] for steps in kept] == [list(range(1, step + 1))] * 2


def test_a_solved_cadence_saves_where_it_says_and_changes_no_bit(train):
    expected = Seen(interruptions=10**9, stalls_s=(1.0,), step_s=1.0)  # so often that every step is saved
    solved = train("solved", "train.steps=3", "train.checkpoint_every_steps=auto", seen=expected)
    said = {e["step"]: e["every_steps"] for e in solved.events() if e["event"] == "cadence"}
    assert said[0] == 1
    steps = [a.step for a in solved.acceptances()]
    assert steps == saved_at(said, 3)  # [1, 2, 3], unless a save took longer than a step here
    assert bits(solved) == bits(train("fixed", "train.steps=3"))
    found = cadence.seen_in(solved.events())
    assert (found.interruptions, len(found.stalls_s), len(found.saves_s)) == (0, len(steps), len(steps))
    assert 0 < found.step_s < found.trained_s


def saved_at(said, steps):
    """Returns after which steps a run saves that changes how often at the steps of `said`."""
    saves, every = [], 0
    while not saves or saves[-1] < steps:
        at = saves[-1] if saves else 0
        every = said.get(at, every)
        saves.append(min(at + every, steps))
    return saves


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    train("a", "train.keep_checkpoints=1")
    assert [p.name for p in (tmp_path / "a/checkpoints/000001").iterdir()] == ["6"]


def test_a_checkpoint_of_other_bits_than_were_accepted_is_refused(train):
    run = train("a", "train.steps=2")
    [accepted] = run.acceptances()
    record = run.at("accepted", "000001.json")
    with open(record) as file:
        text = file.read()
    with open(record, "w") as file:
        file.write(text.replace(accepted.digest, "0" * 64))
    with pytest.raises(DamagedCheckpoint, match="acceptance 1: checkpoints/000001/2: its bits have digest"):
        train("a")


def test_a_missing_checkpoint_is_refused_and_so_is_a_missing_acceptance_instead_of_starting_over(
    train, tmp_path, monkeypatch
):
    run = train("a", "train.steps=2")
    (tmp_path / "a/checkpoints/000001/2").rename(tmp_path / "gone")
    with pytest.raises(DamagedCheckpoint, match="acceptance 1: checkpoints/000001/2"):
        train("a")
    assert run.newest_accepted().number == 1
    claim = RunDir.claim

    def claim_elsewhere(self):  # as a worker sees it whose host has a run directory of its own
        claimed = claim(self)
        (tmp_path / "a/accepted/000001.json").unlink()
        return claimed

    monkeypatch.setattr(RunDir, "claim", claim_elsewhere)
    with pytest.raises(RunDirError, match="acceptance 1, which incarnation 3 goes on from, is not there"):
        train("a")


def test_a_process_that_writes_no_records_measures_its_saves_too(train, monkeypatch):
    from openmoe.platform.train import saver

    measured = []
    monkeypatch.setattr(saver, "jax", SimpleNamespace(process_index=lambda: 1))
    monkeypatch.setattr(saver.Pace, "accepted", lambda self, seconds: measured.append(seconds))
    run = train("a", "train.steps=4")
    assert (len(measured), run.acceptances()) == (2, [])


def test_a_full_disk_is_named_the_accepted_checkpoint_stays_in_force_and_more_room_lets_it_go_on(
    train, tmp_path, mount_disk
):
    mount_disk(tmp_path, "64m")
    run, filler = train("a", "train.steps=2"), tmp_path / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 1_000_000))
    with pytest.raises(StorageError, match="checkpoints/000002/4: cannot be written: the disk is full"):
        train("a")
    assert run.newest_accepted().step == 2
    filler.unlink()
    train("a")
    assert run.newest_accepted().step == 6
    assert [r["step"] for r in run.trace()] == [1, 2, 3, 4, 5, 6]


def test_an_incarnation_that_was_superseded_accepts_nothing_more(train, tmp_path):
    counts = itertools.count(1)

    def claim_at_step_3(record):
        if next(counts) == 3:
            RunDir(str(tmp_path / "a")).claim()

    with pytest.raises(Superseded, match="incarnation 1 is no longer the newest"):
        train("a", report=claim_at_step_3)
    assert {a.step for a in RunDir(str(tmp_path / "a")).acceptances()} <= {2}  # 2 if it was committed before the claim


def test_a_loss_that_is_not_finite_ends_the_incarnation_with_its_rows(train, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step \d, rows \d+\.\.\d+: loss nan"):
        train("a", "optimizer.learning_rate=1.0e+30")
    [event] = [e for e in RunDir(str(tmp_path / "a")).events() if e["event"] == "raised"]
    assert event["error"].startswith("NonFiniteLoss: step")


@pytest.fixture
def poison(monkeypatch):
    """Returns the function that makes the batch from a row on one of whose losses nothing can be learned."""
    from openmoe.platform.train import train_loop

    read = train_loop.global_batch

    def at(row):
        def poisoned(spec, mesh, loader, *, first_row):
            batch = read(spec, mesh, loader, first_row=first_row)
            if first_row != row:
                return batch
            weights = batch["loss_weights"]
            wild = weights.at[0, 0, :2].set(np.asarray([3e38, -3e38], np.float32))  # inf - inf, and a finite sum
            return batch | {"loss_weights": jax.device_put(wild, weights.sharding)}

        monkeypatch.setattr(train_loop, "global_batch", poisoned)

    return at


def test_a_run_goes_back_to_a_clean_checkpoint_leaves_the_guilty_rows_out_and_the_ledger_proves_it(
    train, poison, tmp_path
):
    poison(32)
    rewinds = ("health.on_bad_numbers=rewind", "budgets.bad_numbers=1", "train.keep_checkpoints=1")
    with pytest.raises(NonFiniteLoss, match=r"step 5, rows 24\.\.39: loss nan"):
        train("a", *rewinds)
    run = RunDir(str(tmp_path / "a"))
    run.add_incident(health.incident_of(run.events(), 1))  # as the driver does
    assert run.newest_accepted().step == 2
    train("a", *rewinds)
    assert [r["rows"][0] for r in run.trace()] == [0, 8, 16, 40, 48, 56]
    exit_code, found = openmoe("ledger", "verify", run.path)
    assert (exit_code, found["steps"], found["compared"], found["next_row"]) == (0, 6, 6, 64)
    why = "incident of incarnation 1: step 5: loss nan"
    assert found["skipped"] == [{"incarnation": 2, "lo": 24, "hi": 40, "incident": why}]
    shown = CliRunner().invoke(cli.app, ["ledger", "verify", run.path]).stdout
    assert shown.splitlines()[-1] == "PROVEN: each row of [0, 64) was trained on exactly once or skipped as listed"
    uses = openmoe("data", "explain", run.path, "--row", "33")[1]["uses"]
    assert {(use["incarnation"], use["fate"]) for use in uses} == {(1, "undone"), (2, f"skipped: {why}")}


def test_an_update_that_is_not_finite_is_not_made_and_counted_and_the_ledger_names_its_rows(train, poison):
    poison(16)
    run = train("a", "health.on_bad_numbers=skip", "train.steps=4")
    assert [r["update_skipped"] for r in run.trace()] == [0, 0, 1, 0]
    assert [np.isfinite(r["loss"]) for r in run.trace()] == [True, True, False, True]
    _, found = openmoe("ledger", "verify", run.path, "--no-data")
    incident = f"update skipped: loss nan, gradient norm {run.trace()[2]['grad_norm']}"
    assert found["skipped"] == [{"incarnation": 1, "lo": 16, "hi": 24, "incident": incident}]
    assert (found["holds"], found["steps"], found["trained_rows"]) == (True, 4, 24)
    assert replay.replay(run, run.spec(), 4)[4:] == (2, None)  # the steps after the checkpoint of step 2, all bits
    with pytest.raises(NonFiniteLoss, match=r"step 3, rows 8\.\.23: 1 steps in a row were skipped"):
        train("b", "health.on_bad_numbers=skip", "health.max_skips=0")


def test_other_data_than_the_run_was_trained_on_is_refused(train, data, tmp_path):
    run = train("a", "train.steps=2")
    record = run.at("accepted", "000001.json")
    with open(record) as file:
        text = file.read()
    with open(record, "w") as file:
        file.write(text.replace(data[1].data_id, "another"))
    with pytest.raises(RunDirError, match="was trained on another"):
        train("a")


def test_processes_that_are_not_in_one_group_are_refused(train):
    with pytest.raises(RuntimeError, match="the JAX process group has 1 processes and 8 devices, the run file says"):
        train("a", "cluster.num_workers=2", "cluster.devices_per_worker=4")


def openmoe(*arguments):
    """Exit code and JSON of a command."""
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_the_ledger_proves_what_was_trained_on_with_undone_steps_here_and_on_gs(train, data, gcs, tmp_path):
    def preempted_at_step_5(record):
        if record["step"] == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train("a", report=preempted_at_step_5)
    run = train("a")
    exit_code, found = openmoe("ledger", "verify", run.path)
    assert exit_code == 0
    start = run.step_of(run.claims()[1].resumes)  # 4, or 2 if that save was not committed yet
    line = [{"incarnation": 1, "first": 1, "last": start}, {"incarnation": 2, "first": start + 1, "last": 6}]
    undone = [{"incarnation": 1, "first": start + 1, "last": 5}]
    told = {"run": "quickstart", "holds": True, "steps": 6, "next_row": 48, "trained_rows": 48, "tokens": 6144}
    told |= {"compared": 6, "head": run.acceptances()[-1].ledger_head, "line": line, "undone": undone}
    told |= {"skipped": [], "not_accepted": [], "unrecorded": [], "contradiction": None}
    assert found == told
    copy, folders = RunDir(f"{gcs}/ledger"), ("incarnations", "accepted", "ledger")
    inside = [(folder, name) for folder in folders for name in storage.list_files(run.at(folder))]
    for parts in [("run.json",), *inside]:
        storage.write_durable(copy.at(*parts), storage.read_bytes(run.at(*parts)))
    assert openmoe("ledger", "verify", copy.path, "--sample", "3") == (0, told | {"compared": 3})
    shown = CliRunner().invoke(cli.app, ["ledger", "verify", run.path]).stdout
    assert shown.splitlines()[-1] == "PROVEN: each row of [0, 48) was trained on exactly once"
    shown = CliRunner().invoke(cli.app, ["ledger", "verify", run.path, "--no-data"]).stdout
    assert shown.splitlines()[-1].startswith("CONSISTENT: the entries say that each row of [0, 48) was trained on")
    with pytest.raises(SpecError, match="--steps 7:9: the newest checkpoint is that of step 6"):
        CliRunner().invoke(cli.app, ["ledger", "verify", run.path, "--steps", "7:9"], catch_exceptions=False)
    _, explained = openmoe("data", "explain", run.path, "--row", "39")
    assert explained["row"] == 39
    assert explained["uses"] == [
        {"step": 5, "incarnation": 1, "fate": "undone"},
        {"step": 5, "incarnation": 2, "fate": "counts"},
    ]
    shown = CliRunner().invoke(cli.app, ["data", "explain", run.path, "--row", "39"]).stdout
    assert "\nused     step 5 of incarnation 1 (undone); step 5 of incarnation 2 (counts)\n" in shown
    [segment, *_] = explained["segments"]
    assert f"\n  {segment['origin']['file']}, {segment['origin']['unit']} {segment['origin']['offset']:,}\n" in shown
    assert openmoe("data", "explain", data[1].path, "--row", "39") == (0, explained | {"uses": None})


def test_the_ledger_names_a_step_that_got_other_rows_than_it_says(train, monkeypatch):
    from openmoe.platform.train import train_loop

    read = train_loop.global_batch

    def stale(spec, mesh, loader, *, first_row):
        return read(spec, mesh, loader, first_row=8 if first_row == 24 else first_row)

    monkeypatch.setattr(train_loop, "global_batch", stale)
    run = train("a")
    exit_code, found = openmoe("ledger", "verify", run.path)
    assert exit_code == 1
    contradiction = found["contradiction"]
    assert (contradiction["step"], contradiction["rows"], contradiction["incarnation"]) == (4, [24, 32], 1)
    assert contradiction["what"] == "trained on something else than the shards hold"
    assert contradiction["hint"] == "to be what rows [8, 16) hold"
    assert (found["steps"], found["compared"]) == (3, 3)
    assert openmoe("ledger", "verify", run.path, "--steps", "5:6")[0] == 0
    assert openmoe("ledger", "verify", run.path, "--no-data")[0] == 0


def rows_of(loader, *parts):
    batches = [loader.rows(*part) for part in parts]
    return {key: np.concatenate([batch[key] for batch in batches]) for key in checksum.KEYS}


@pytest.mark.parametrize(
    ("consumed", "hint"),
    [
        ([(24, 32)], None),
        ([(28, 32), (24, 28)], None),  # in another order: the same step
        ([(16, 24)], "to be what rows [16, 24) hold"),
        ([(32, 40)], "to be what rows [32, 40) hold"),
        ([(23, 31)], "to be what rows [23, 31) hold"),
        ([(24, 28), (40, 41), (29, 32)], "to be what these rows hold with row 40 in the place of row 28"),
        ([(24, 28), (24, 28)], ""),
        ([(24, 31)], ""),
    ],
)
def test_other_rows_than_the_ledger_says_are_told_apart(data, consumed, hint):
    loader = Loader(data[1].path)
    sums = checksum.batch_checksum(rows_of(loader, *consumed)).tolist()
    mismatch = Comparison(loader)(ledger.trained("", Position(4, 32), 24, sums))
    assert mismatch is None if hint is None else mismatch.hint == hint


def test_reading_ahead_changes_no_answer(data, monkeypatch):
    monkeypatch.setattr(ledger_data, "READ_ROWS", 20)
    loader = Loader(data[1].path)
    compare, firsts = Comparison(loader), [*range(0, loader.num_rows - 8, 8), 3, 11, 19, 0, loader.num_rows - 8]
    for lo in firsts:
        sums = checksum.batch_checksum(loader.rows(lo, lo + 8)).tolist()
        assert compare(ledger.trained("", Position(1, lo + 8), lo, sums)) is None
        assert compare(ledger.trained("", Position(1, lo + 8), lo, [sums[0], 0])) is not None


def test_a_run_without_a_ledger_says_so(tmp_path):
    run = RunDir(f"{tmp_path}/a")
    run.create(spec.load("quickstart", [*SMALL, f"run_dir={run.path}"]))
    with pytest.raises(RunDirError, match="has no ledger: a version that kept none trained it"):
        CliRunner().invoke(cli.app, ["ledger", "verify", run.path], catch_exceptions=False)
