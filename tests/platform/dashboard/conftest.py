"""Run directories written as a driver and its workers write them, without training."""

import json
from dataclasses import asdict

import pytest

from openmoe.platform.run.journal import Journal
from openmoe.platform.run.lineage import Acceptance
from openmoe.platform.run.run_dir import RunDir
from openmoe.platform.run.verdict import Decision, Verdict
from openmoe.platform.run_file import spec

DRIVER = 99_999


class WrittenRun:
    """A run of 2 MoE layers with 4 experts, 1,000 tokens a step, one step a second; its clock starts at 1,000 s."""

    def __init__(self, path, steps=100):
        self.dir = RunDir(str(path))
        self.now_s = 1000.0
        loaded = spec.load("quickstart", [f"train.steps={steps}", "train.batch_rows=4"])
        self.dir.create(loaded)
        record = self.dir.read_json("run.json") | {"created_s": self.now_s}
        record["spec"]["data"]["seq_len"] = 250
        record["spec"]["data"]["stages"] = [
            {"until_tokens": 30_000, "weights": {"c4": 1, "the_stack": 0}, "objective": "ul2"},
            {"until_tokens": None, "weights": {"c4": 1, "the_stack": 3}, "objective": "next_token"},
        ]
        (path / "run.json").write_text(json.dumps(record))
        self.journals = {}
        self.acceptances = 0
        self.incarnation = 0

    def claim(self, after_s=0.0, **more):
        """Starts a worker group; returns the step it starts at."""
        self.now_s += after_s
        claim = self.dir.claim()
        path = self.dir.at("incarnations", f"{claim.incarnation:06d}.json")
        with open(path) as file:
            record = json.load(file) | {"time_s": self.now_s}
        with open(path, "w") as file:
            json.dump(record, file)
        self.incarnation, self.step = claim.incarnation, self.dir.step_of(claim.resumes)
        facts = {"mesh": {"data": 1, "expert": 4}, "data_id": "d" * 32, "jax": "0.10.2", "jaxlib": "0.10.2"}
        self.event("started", steps=100, device="cpu", processes=2, devices=4, **facts | more)
        return self.step

    def train(self, steps, loss=lambda step: 9 - step / 100, *, flush=True, **more):
        """Records so many steps."""
        for _ in range(steps):
            self.step += 1
            self.now_s += 1.0
            load = [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]
            record = {"step": self.step, "time_s": self.now_s, "step_s": 1.0, "loss": loss(self.step) + 0.1}
            record |= {"text_loss": loss(self.step), "drop_fraction": 0.25, "grad_norm": 2.0, "expert_load": load}
            record |= {"router_entropy": [0.75, 0.5]}
            self.journal("metrics").append(record | more)
        if flush:
            self.journal("metrics").flush()

    def accept(self):
        """Accepts a checkpoint of the newest step."""
        self.acceptances += 1
        accepted = Acceptance(
            number=self.acceptances, incarnation=self.incarnation, step=self.step, next_row=4 * self.step,
            checkpoint=f"checkpoints/{self.incarnation:06d}/{self.step}", digest="", ledger_head="", data_id="",
        )  # fmt: skip
        self.acceptances = self.dir.accept(accepted).number
        self.event("accepted", step=self.step, number=self.acceptances, seconds=1.0)

    def end(self, cause="host_fault", reason="the process of rank 1 died", action="retry", **more):
        """Journals the driver's verdict."""
        verdict = Verdict(cause=cause, reason=reason, **more)
        decision = Decision(action=action, reason=f"{cause} 1 of 10: {reason}")
        self.event("ended", DRIVER, **asdict(verdict), decision=asdict(decision))

    def finish(self, **more):
        """Writes finished.json."""
        self.dir.finish({"time_s": self.now_s, "steps": self.step, "loss": 5.25, "unigram_entropy": 6.5} | more)

    def event(self, kind, process=0, **facts):
        """Journals an event of now."""
        journal = self.journal("journal", process)
        journal.append({"event": kind, "time_s": self.now_s, **facts})
        journal.flush()

    def journal(self, folder, process=0):
        """The journal of the newest incarnation."""
        key = (folder, self.incarnation, process)
        if key not in self.journals:
            self.journals[key] = Journal(self.dir.at(folder), incarnation=self.incarnation, process=process)
        return self.journals[key]

    def with_two_interruptions(self):
        """40 steps and a dead worker, 20 of them undone; 40 more and a driver that was killed; 10 more."""
        self.claim()
        self.train(20)
        self.accept()
        self.train(20)
        self.end(evidence=("slice-a-0 is gone",), trace="Traceback: it died")
        self.claim(after_s=10)
        self.train(30)
        self.accept()
        self.train(10)
        self.claim(after_s=30)
        self.train(10)
        return self


@pytest.fixture
def written(tmp_path):
    """Returns a function that begins a run directory in tmp_path/runs."""
    (tmp_path / "runs").mkdir()
    return lambda name="a", **more: WrittenRun(tmp_path / "runs" / name, **more)


@pytest.fixture(scope="module")
def served(start_dashboard, tmp_path_factory):
    """`openmoe dashboard` in a process of its own: (address, token, a function that begins a run where it looks)."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "runs").mkdir()
    return *start_dashboard(folder / "runs", folder / "home"), lambda name: WrittenRun(folder / "runs" / name)
