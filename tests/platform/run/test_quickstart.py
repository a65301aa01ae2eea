"""`openmoe quickstart` of a finished run says so, and where another one would go."""

import pytest

from openmoe.platform.run import quickstart
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run_file import spec


def create(path, *, steps=0):
    run = RunDir(str(path))
    run.create(spec.load("quickstart", [f"run_dir={path}"]))
    if steps:
        run.finish({"steps": steps})


def test_a_finished_quickstart_says_so_and_offers_another_one(tmp_path, capsys):
    path = tmp_path / "run"
    create(path, steps=100)
    assert quickstart.main(new=False, run_dir=str(path)) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"quickstart is finished already (100 steps): {path}/summary.html",
        "to train on: train.steps=200, or another run_dir to start over",
    ]
    assert said.out == f"another one from scratch: openmoe quickstart --new --run-dir {path}\n"


def test_without_a_run_directory_the_offer_names_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create("openmoe-runs/quickstart", steps=100)
    assert quickstart.main(new=False, run_dir=None) == 0
    assert capsys.readouterr().out == "another one from scratch: openmoe quickstart --new\n"


@pytest.mark.parametrize(
    ("there", "free"),
    [([], "run"), (["run"], "run-2"), (["run", "run-2"], "run-3"), (["run", "run-3"], "run-2"), (["run-2"], "run")],
)
def test_another_quickstart_takes_the_next_free_directory_and_shares_the_data(tmp_path, monkeypatch, there, free):
    trained = []
    monkeypatch.setattr(quickstart.driver, "train", lambda loaded, **rest: trained.append(loaded) or 1)
    for name in there:
        create(tmp_path / name)
    for run_dir in (f"{tmp_path}/run", f"{tmp_path}/run/"):
        quickstart.main(new=True, run_dir=run_dir, overrides=["train.steps=70"])
        another = trained.pop()
        assert (another.run_dir, another.train.steps) == (f"{tmp_path}/{free}", 70)
        assert another.data_dir == f"{tmp_path}/run/data"
