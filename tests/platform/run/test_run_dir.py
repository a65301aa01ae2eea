"""The run directory keeps its promises on real files: claims are exclusive, records immutable, damage is named."""

import json
import multiprocessing
from pathlib import Path

import pytest

from openmoe.pipelines import storage
from openmoe.pipelines.storage import StorageError
from openmoe.platform.run import journal
from openmoe.platform.run.journal import Journal, JournalError
from openmoe.platform.run.lineage import Acceptance, Incident, Rows
from openmoe.platform.run.run_dir import RunDir, RunDirError, list_runs
from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError


def acceptance(number, incarnation, step):
    return Acceptance(
        number=number, incarnation=incarnation, step=step, next_row=step,
        checkpoint=f"checkpoints/{incarnation:06d}/{step}", digest="", ledger_head="", data_id="",
    )  # fmt: skip


def saved(run, *steps):
    """Checkpoints of incarnation 1, accepted in this order."""
    for number, step in enumerate(steps, 1):
        Path(run.at("checkpoints/000001", str(step))).mkdir(parents=True)
        run.accept(acceptance(number, 1, step))


@pytest.fixture
def run(tmp_path):
    return RunDir(str(tmp_path / "run"))


def test_claims_count_up_and_name_what_they_go_on_from(run):
    assert (run.claim().incarnation, run.claim().resumes) == (1, 0)
    run.accept(acceptance(1, 2, 20))
    third = run.claim()
    assert (third.incarnation, third.resumes) == (3, 1)


def test_an_acceptance_takes_the_first_free_number(run):
    run.claim()
    assert run.accept(acceptance(1, 1, 20)).number == 1
    assert run.accept(acceptance(1, 1, 40)).number == 2
    assert [a.step for a in run.acceptances()] == [20, 40]


def test_what_an_older_incarnation_accepts_later_is_not_gone_on_from(run):
    run.claim()
    run.accept(acceptance(1, 1, 20))
    run.claim()
    run.accept(acceptance(2, 1, 40))
    assert run.newest_accepted().step == 20


def test_of_those_before_a_quarantined_checkpoint_the_newest_that_was_not_removed_is_gone_on_from(run):
    run.claim()
    saved(run, 20, 40, 60, 80)
    for step in (40, 60):
        Path(run.at("checkpoints/000001", str(step))).rmdir()
    run.quarantine(4, "its bits differ")
    assert run.newest_accepted().step == 20
    assert run.claim().resumes == 1


def test_a_run_that_has_lost_all_its_checkpoints_is_not_started_over_by_itself(run):
    run.claim()
    saved(run, 20, 40)
    Path(run.at("checkpoints/000001/20")).rmdir()
    run.quarantine(2, "cannot be read: PERMISSION_DENIED")
    with pytest.raises(RunDirError) as error:
        run.claim()
    assert str(error.value) == (
        f"run_dir: {run.path}: no checkpoint is left that can be restored (acceptance 2, step 40: cannot be read: "
        "PERMISSION_DENIED); if it is whole after all, remove quarantined/000002.json; to start over, choose another "
        "run_dir"
    )
    Path(run.at("quarantined/000002.json")).unlink()
    assert run.claim().resumes == 2


def test_a_run_whose_first_rows_were_bad_starts_over_without_them(run):
    run.claim()
    saved(run, 20)
    run.add_incident(Incident(incarnation=1, step=21, rows=Rows(0, 21), reason="loss nan", time_s=1.0))
    assert run.claim().resumes == 0


def test_a_record_whose_answer_was_lost_is_this_callers_own(run, monkeypatch):
    """The client of gs:// repeats such a request, and is told that the name is taken."""
    create = storage.create_if_absent
    monkeypatch.setattr(storage, "create_if_absent", lambda path, data: create(path, data) and False)
    assert run.claim().incarnation == 1
    assert run.accept(acceptance(1, 1, 20)).number == 1
    assert [a.step for a in run.acceptances()] == [20]


def test_records_are_read_once(run, monkeypatch):
    run.claim()
    saved(run, *range(20, 100, 20))
    read_all, asked = storage.read_all, []
    monkeypatch.setattr(storage, "read_all", lambda paths: asked.extend(paths) or read_all(paths))
    assert len(run.acceptances()) == 4
    run.accept(acceptance(5, 1, 100))
    assert len(run.acceptances()) == 5
    assert asked == [run.at("accepted", f"{number:06d}.json") for number in range(1, 6)]


def _claim(path, results):
    try:
        results.put(RunDir(path).claim().incarnation)
    except RunDirError:
        results.put(None)


def test_of_drivers_that_claim_at_once_no_two_get_the_same_incarnation(run):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    drivers = [context.Process(target=_claim, args=(run.path, results)) for _ in range(4)]
    for driver in drivers:
        driver.start()
    claimed = [results.get(timeout=60) for _ in drivers]
    for driver in drivers:
        driver.join()
    numbers = [n for n in claimed if n is not None]
    assert numbers
    assert len(set(numbers)) == len(numbers)
    assert sorted(c.incarnation for c in run.claims()) == sorted(numbers)


def test_a_run_directory_of_other_mathematics_is_refused_with_the_difference(run):
    run.create(spec.load("quickstart"))
    run.create(spec.load("quickstart", ["train.steps=500", "cluster.num_workers=1", "cluster.devices_per_worker=4"]))
    with pytest.raises(RunDirError) as error:
        run.create(spec.load("quickstart", ["seed=7"]))
    assert str(error.value) == (
        f"run_dir: {run.path} belongs to another run (data.seed: 0 there, 7 here; seed: 0 there, 7 here); "
        "choose another run_dir, or restore those settings to go on with it"
    )


def test_a_damaged_record_is_named(run, tmp_path):
    run.claim()
    (tmp_path / "run" / "incarnations" / "000001.json").write_text("{")
    with pytest.raises(RunDirError, match=r"incarnations/000001\.json: not readable as JSON"):
        run.claims()


def test_runs_are_listed_from_their_files_alone(tmp_path):
    loaded = spec.load("quickstart")
    run = RunDir(str(tmp_path / "a"))
    run.create(loaded)
    (tmp_path / "no-run").mkdir()
    claim = run.claim()
    metrics = Journal(run.at("metrics"), incarnation=claim.incarnation, process=0)
    metrics.append({"step": 3, "loss": 5.5, "time_s": 1.0})
    metrics.flush()
    [found] = list_runs(str(tmp_path))
    assert (found.name, found.state, found.step, found.steps, found.loss) == (
        "quickstart",
        "resumable",
        3,
        loaded.train.steps,
        5.5,
    )
    assert list_runs(run.path) == [found]


def test_the_name_of_a_run_leads_to_its_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunDir("openmoe-runs/twin").create(spec.load("twin"))
    with pytest.raises(RunDirError, match=r"^twin: no run is here; did you mean openmoe-runs/twin\?$"):
        RunDir("twin").must_exist()


def test_a_journal_is_read_in_the_order_written(run):
    for incarnation in (2, 1):
        written = Journal(run.at("journal"), incarnation=incarnation, process=0)
        for number in range(3):
            written.append({"n": number})
            written.flush()
    assert [(i, p, r["n"]) for i, p, r in journal.read(run.at("journal"))] == [
        (i, 0, n) for i in (1, 2) for n in range(3)
    ]


def test_floats_come_back_from_the_journal_with_every_bit(run):
    values = [0.1, 1 / 3, 6.103515625e-05, 1e-45, float("inf")]
    written = Journal(run.at("metrics"), incarnation=1, process=0)
    written.append({"values": values})
    written.flush()
    [(_, _, record)] = journal.read(run.at("metrics"))
    assert [v.hex() for v in record["values"]] == [v.hex() for v in values]


def test_two_writers_of_one_incarnation_are_caught(run):
    first, second = (Journal(run.at("journal"), incarnation=1, process=0) for _ in range(2))
    first.append({"n": 1})
    first.flush()
    second.append({"n": 2})
    with pytest.raises(JournalError, match="two processes write as incarnation 1"):
        second.flush()


def test_a_damaged_segment_is_named_with_its_line(run, tmp_path):
    folder = tmp_path / "run" / "journal"
    folder.mkdir(parents=True)
    (folder / "000001-00000-000000.jsonl").write_text(json.dumps({"n": 1}) + "\n{broken\n")
    with pytest.raises(JournalError, match=r"000001-00000-000000\.jsonl:2: not JSON"):
        list(journal.read(run.at("journal")))


def test_an_unwritable_run_directory_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run\.json: cannot be written"):
        RunDir(str(tmp_path / "file" / "run")).create(spec.load("quickstart"))


def test_a_run_of_a_newer_version_is_said_to_be_one(run):
    run.create(spec.load("quickstart", [f"run_dir={run.path}"]))
    record = run.record()
    record["spec"]["train"]["lookahead"] = 3
    (path := Path(run.at("run.json"))).write_text(json.dumps(record))
    with pytest.raises(SpecError) as error:
        run.spec()
    unknown, whose = str(error.value).splitlines()
    assert unknown.startswith(f"{path}: train.lookahead: ")
    assert whose == f"{path}: another version of openmoe created the run, which alone can go on with it"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "holds list, not an object; the run directory is damaged"),
        ('{"name": "x"}', "not that of a run, it has no `spec`; choose another run_dir"),
        ('{"format": 9}', "not of format 1, which this version reads"),
        ('{"na', "not readable as JSON (Unterminated string starting at: line 1 column 2 (char 1)); "
         "the run directory is damaged"),
    ],
)  # fmt: skip
def test_a_foreign_run_json_is_refused_and_hides_no_other_run(tmp_path, content, problem):
    path = tmp_path / "foreign" / "run.json"
    path.parent.mkdir()
    path.write_text(content)
    loaded = spec.load("quickstart", [f"run_dir={path.parent}"])
    with pytest.raises(RunDirError) as error:
        RunDir(str(path.parent)).create(loaded)
    assert str(error.value) == f"{path}: {problem}"
    RunDir(str(tmp_path / "ours")).create(loaded)
    assert [(run.name, run.state, run.problem) for run in list_runs(str(tmp_path))] == [
        ("foreign", "damaged", f"{path}: {problem}"),
        ("quickstart", "started", ""),
    ]
