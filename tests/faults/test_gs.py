"""A run whose data, records and checkpoints all lie on gs:// (a real emulator over HTTP) survives a kill as well."""

import json

import pytest
from typer.testing import CliRunner

from openmoe.pipelines import storage
from openmoe.platform.commands import cli

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_a_run_on_gs_that_is_killed_resumes_with_the_bits_of_a_local_one(trainer, undisturbed, gcs, curves):
    run = trainer("unused", f"data_dir={gcs}/data")
    run.run_dir = f"{gcs}/run"
    run.start()
    run.wait_for_acceptance(2)
    run.kill_everything()
    run.start()
    run.finish()
    ours, theirs = run.run.trace(), undisturbed.trace()
    assert [r["rows"] for r in ours] == [r["rows"] for r in theirs]
    assert [r["batch_checksum"] for r in ours] == [r["batch_checksum"] for r in theirs]
    assert [r["loss"].hex() for r in ours] == [r["loss"].hex() for r in theirs]
    assert curves(run.run.at("tensorboard"))["loss/cross_entropy"] == {r["step"]: r["loss"] for r in theirs}
    assert [c.incarnation for c in run.run.claims()] == [1, 2]
    assert run.run.finished()["steps"] == 60
    proven = CliRunner().invoke(cli.app, ["ledger", "verify", run.run_dir, "--json"])
    assert proven.exit_code == 0, proven.output
    found = json.loads(proven.stdout)
    assert (found["compared"], found["head"]) == (60, undisturbed.newest_accepted().ledger_head)
    accepted = [acceptance.checkpoint for acceptance in run.run.acceptances()]
    assert [path for path in accepted if storage.exists(run.run.at(path))] == accepted[-3:]  # keep_checkpoints
