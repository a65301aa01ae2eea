"""A loss that leaps up in a real run: the driver sends it back, and on without the rows, and the ledger proves it."""

import json
import random
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SOURCES = """[
  {name: calm, format: redpajama, paths: [FOLDER/calm.jsonl], weight: 1999},
  {name: wild, format: redpajama, paths: [FOLDER/wild.jsonl], weight: 1}]"""
# One of the first 2,000 rows is of the second source. Which, is arithmetic with the seed: 113, with a row a step.
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "that",
    "by",
    "with",
    "as",
    "at",
    "from",
    "his",
    "it",
)
STEPS, GUILTY, SEEN_AT = 125, (112, 114), 114


@pytest.fixture
def sources(tmp_path):
    """Words in any order, which is soon all that there is to learn, and characters that occur nowhere else."""
    rng = random.Random(0)
    calm = [{"text": " ".join(rng.choices(WORDS, k=120))} for _ in range(300)]
    wild = [{"text": "".join(chr(0x4E00 + 7919 * n % 20_000) for n in range(200))}]
    for name, documents in (("calm", calm), ("wild", wild)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return SOURCES.replace("FOLDER", str(tmp_path))


def test_a_spike_sends_the_run_back_to_a_clean_checkpoint_and_on_without_its_rows_and_the_ledger_proves_it(
    trainer, sources, tmp_path
):
    policy = ("health.on_bad_numbers=rewind", "health.spike_score=30", "health.spike_window_steps=32")
    started = trainer(
        *("run", *policy, "budgets.bad_numbers=1", f"data.sources={sources}", f"data_dir={tmp_path}/data"),
        *("mesh.expert=1", "cluster.num_workers=1", "cluster.devices_per_worker=1", "train.batch_rows=1"),
        *(f"train.steps={STEPS}", "train.checkpoint_every_steps=40"),
    )
    started.start()
    said, run = started.finish(), started.run
    losses = [round(record["loss"], 2) for record in run.trace()]
    assert "incarnation 1 ended, retry: bad_numbers 1 of 1: the loss is not finite, or has leapt up: " in said, losses
    assert "goes back to step 80, and leaves out rows [112, 114)" in said
    [incident] = run.incidents()
    assert (incident.incarnation, incident.step, incident.rows) == (1, SEEN_AT, GUILTY)
    assert "deviations above the median" in incident.reason
    assert [run.step_of(claim.resumes) for claim in run.claims()] == [0, 80]
    rows = [row for row in range(STEPS + 2) if not GUILTY[0] <= row < GUILTY[1]]
    assert [record["rows"] for record in run.trace()] == [[row, row + 1] for row in rows]

    command = [sys.executable, "-m", "openmoe.platform", "ledger", "verify", run.path, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout)
    assert (found["holds"], found["steps"], found["compared"], found["next_row"]) == (True, STEPS, STEPS, STEPS + 2)
    why = f"incident of incarnation 1: {incident.reason}"
    assert found["skipped"] == [{"incarnation": 2, "lo": GUILTY[0], "hi": GUILTY[1], "incident": why}]
    assert [(part["incarnation"], part["first"]) for part in found["undone"]] == [(1, 81)]
