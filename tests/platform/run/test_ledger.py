"""The ledger proves what it says of any history, and any record that was changed is named."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.platform.run import ledger, lineage
from openmoe.platform.run.ledger import Mismatch, Skipped, Steps
from openmoe.platform.run.lineage import Acceptance, Claim, Position, valid_acceptances

BATCH_ROWS = 4


def content(lo, hi):
    """What stands for the checksum of rows [lo, hi)."""
    return [lo * 1009 + hi, hi * 7]


class History:
    """A run as its records tell it, and, kept apart from them, what really happened."""

    def __init__(self):
        self.claims, self.acceptances, self.quarantined, self.records = [], [], [], []
        self.fates = []  # of each record: "counts", "undone", "not accepted"
        self.superseded = None  # incarnation, position and head of one that lives on though another has the run
        self.preempt()

    def preempt(self, lost=0):
        """The newest incarnation ends; of its last records `lost` were not durable; the next one claims the run."""
        newest = self.claims[-1].incarnation if self.claims else 0
        self.superseded = (newest, self.position, self.head) if newest and not lost else None
        durable = max((i for i, fate in enumerate(self.fates) if fate == "counts"), default=-1) + 1
        while lost and len(self.records) > durable and self.records[-1][0] == newest:
            self.records.pop(), self.fates.pop()
            lost -= 1
        resumes = self.newest_accepted()
        self.claims.append(Claim(incarnation=newest + 1, resumes=resumes.number if resumes else 0, time_s=0.0))
        kept = resumes.next_row if resumes else 0
        for i, (_, record) in enumerate(self.records):
            self.fates[i] = "counts" if self.fates[i] == "counts" and record["rows"][1] <= kept else "undone"
        self.position = Position(resumes.step, resumes.next_row) if resumes else Position()
        self.head = resumes.ledger_head if resumes else ""

    def zombie(self):
        """The incarnation before the newest, which does not know it, takes one more step and accepts it."""
        if self.superseded is None:
            return
        n, position, head = self.superseded
        after = position.after(rows=BATCH_ROWS)
        entry = ledger.trained(head, after, position.next_row, content(position.next_row, after.next_row))
        at = sum(incarnation <= n for incarnation, _ in self.records)
        self.records.insert(at, (n, ledger.to_json(entry)))
        self.fates.insert(at, "undone")
        self.acceptances.append(self._acceptance(n, after, entry.digest))
        self.superseded = (n, after, entry.digest)

    def newest_accepted(self):
        valid = valid_acceptances(self.claims, self.acceptances, self.quarantined)
        return valid[-1] if valid else None

    def _append(self, entry):
        self.head = entry.digest
        self.records.append((self.claims[-1].incarnation, json.loads(json.dumps(ledger.to_json(entry)))))
        self.fates.append("not accepted")

    def step(self):
        row, self.position = self.position.next_row, self.position.after(rows=BATCH_ROWS)
        self._append(ledger.trained(self.head, self.position, row, content(row, self.position.next_row)))

    def skip(self):
        row = self.position.next_row
        self.position = Position(self.position.step, row + BATCH_ROWS)
        self._append(ledger.skipped(self.head, self.position, row, "loss spike"))

    def unapplied(self):
        """A step whose update is not made."""
        row, self.position = self.position.next_row, self.position.after(rows=BATCH_ROWS)
        checksum = content(row, self.position.next_row)
        self._append(ledger.trained(self.head, self.position, row, checksum, "update skipped: loss nan"))

    def accept(self):
        newest = self.newest_accepted()
        if self.position.step <= (newest.step if newest else 0):
            return
        self.acceptances.append(self._acceptance(self.claims[-1].incarnation, self.position, self.head))
        for i in range(len(self.fates)):
            if self.fates[i] == "not accepted":
                self.fates[i] = "counts"

    def _acceptance(self, incarnation, position, head):
        number = max((a.number for a in self.acceptances), default=0) + 1
        return Acceptance(
            number=number, incarnation=incarnation, step=position.step, next_row=position.next_row, checkpoint="",
            digest="", ledger_head=head, data_id="data",
        )  # fmt: skip

    def quarantine(self):
        """The newest checkpoint turns out to be damaged: the one before it is gone on from."""
        if newest := self.newest_accepted():
            self.quarantined.append(newest.number)
        self.preempt()

    def verify(self, **options):
        return ledger.verify(self.claims, self.acceptances, self.quarantined, self.records, **options)

    def counted(self):
        return [i for i, fate in enumerate(self.fates) if fate == "counts"]


def history(*actions):
    made = History()
    for action in actions:
        getattr(made, action)()
    return made


def compare(entry):
    wanted = content(entry.lo, entry.hi)
    return None if list(entry.checksum) == wanted else Mismatch(f"{wanted}", f"{list(entry.checksum)}", "a hint")


STEPS = ["step"] * 6
ACTIONS = st.lists(
    st.sampled_from([*["step"] * 3, *["accept"] * 2, "skip", "unapplied", "preempt", "quarantine", "zombie"]),
    max_size=40,
)


@settings(deadline=None)
@given(ACTIONS)
def test_of_any_history_it_says_what_happened(actions):
    made = history(*actions, *STEPS, "accept", "step")
    found = made.verify(compare=compare)
    assert found.holds, found.contradiction
    counted = [made.records[i][1] for i in made.counted()]
    steps_taken = [r for r in counted if "checksum" in r]
    trained = [r for r in steps_taken if "skipped" not in r]
    assert found.position == Position(steps_taken[-1]["step"], counted[-1]["rows"][1])
    assert [row for r in counted for row in range(*r["rows"])] == list(range(found.position.next_row))
    assert found.compared == len(steps_taken) == found.position.step
    assert found.trained_rows == BATCH_ROWS * len(trained)
    assert sum(s.hi - s.lo for s in found.skipped) == BATCH_ROWS * (len(counted) - len(trained))
    steps = dict.fromkeys(("counts", "undone", "not accepted"), 0)
    for fate, (_, record) in zip(made.fates, made.records, strict=True):
        steps[fate] += "checksum" in record
    told = {"counts": found.line, "undone": found.undone, "not accepted": found.not_accepted}
    assert {fate: sum(s.last - s.first + 1 for s in parts) for fate, parts in told.items()} == steps


@settings(deadline=None)
@given(ACTIONS, st.integers(0, 20))
def test_records_that_were_not_durable_when_everything_was_killed_are_not_missed(actions, lost):
    made = history(*actions, *STEPS)
    made.preempt(lost)
    for _ in STEPS:
        made.step()
    made.accept()
    assert made.verify(compare=compare).holds


@settings(deadline=None)
@given(ACTIONS)
def test_equal_heads_mean_the_same_batches_whatever_happened_between(actions):
    made = history(*[a for a in actions if a not in ("skip", "unapplied")], *STEPS, "accept")
    undisturbed = history(*["step"] * made.position.step, "accept")
    assert made.verify().head == undisturbed.verify().head


def _drop(records, i):
    del records[i]


def _repeat(records, i):
    records.insert(i, records[i])


def _swap(records, i):
    records[i], records[i - 1] = records[i - 1], records[i]


def _change(**fields):
    def change(records, i):
        incarnation, record = records[i]
        records[i] = (incarnation, {**record, **{key: value(record) for key, value in fields.items()}})

    return change


DAMAGE = {
    "dropped": _drop,
    "repeated": _repeat,
    "swapped": _swap,
    "step": _change(step=lambda r: r["step"] + 1),
    "rows": _change(rows=lambda r: [r["rows"][0], r["rows"][1] + 1]),
    "first row": _change(rows=lambda r: [r["rows"][0] - 1, r["rows"][1]]),
    "checksum": _change(checksum=lambda r: [1, 2]),
    "digest": _change(digest=lambda r: "0" * 64),
    "trained on, not skipped": _change(skipped=lambda r: "it was not"),
    "update made, not skipped": _change(skipped=lambda r: "it was not"),
    "too large": _change(checksum=lambda r: [2**32, 0]),
    "no numbers": _change(rows=lambda r: ["0", "4"]),
}


@settings(deadline=None)
@given(ACTIONS, st.sampled_from(sorted(DAMAGE)), st.randoms(use_true_random=False))
def test_any_changed_record_of_the_line_is_found_without_the_data(actions, damage, random):
    made = history(*actions, *STEPS, "accept", "step")
    counted = made.counted()
    at = random.choice([i for i in counted if "checksum" in made.records[i][1]])
    if damage == "swapped" and made.records[at - 1][0] != made.records[at][0]:
        at = counted[-1]
    DAMAGE[damage](made.records, at)
    if damage == "trained on, not skipped":
        made.records[at][1].pop("checksum")
    found = made.verify()
    assert not found.holds
    assert found.contradiction


@settings(deadline=None)
@given(ACTIONS, st.sampled_from(["step", "next_row", "ledger_head", "data_id"]), st.randoms(use_true_random=False))
def test_any_changed_acceptance_of_the_line_is_found_without_the_data(actions, name, random):
    made = history(*actions, *STEPS, "accept", *STEPS, "accept", "step")
    stretches = lineage.line(made.claims, made.acceptances, made.quarantined)
    changed = random.choice([a for stretch in stretches for a in stretch.accepted])
    value = getattr(changed, name)
    other = replace(changed, **{name: f"other {value}" if isinstance(value, str) else value + random.choice([-1, 1])})
    made.acceptances[made.acceptances.index(changed)] = other
    assert made.verify().contradiction


@pytest.fixture
def killed():
    """Incarnation 1 trained 6 steps, of which 4 were accepted; incarnation 2 went on to step 8, and trains step 9."""
    return history(*STEPS[:4], "accept", *STEPS[:2], "preempt", *STEPS[:2], "skip", *STEPS[:2], "accept", "step")


def test_a_killed_run_is_told_step_by_step(killed):
    found = killed.verify(compare=compare)
    assert found.holds
    assert found.position == Position(8, 36)
    assert found.line == [Steps(1, 1, 4), Steps(2, 5, 8)]
    assert found.undone == [Steps(1, 5, 6)]
    assert found.not_accepted == [Steps(2, 9, 9)]
    assert found.skipped == [Skipped(2, 24, 28, "loss spike")]
    assert (found.trained_rows, found.compared) == (32, 8)


def lines(found):
    return found.contradiction.lines()


def test_a_missing_step_is_named(killed):
    del killed.records[2]
    assert lines(killed.verify()) == [
        "step 4, rows [12, 16), incarnation 1: rows [8, 12) are missing",
        "expected step 3, rows from 8 on",
        "found    rows [12, 16) trained on at step 4",
    ]


def test_missing_steps_before_a_checkpoint_are_named(killed):
    del killed.records[9:]
    assert lines(killed.verify()) == [
        "step 7, rows [28, 36), incarnation 2: steps are missing",
        "expected entries up to step 8, for which acceptance 2 stands",
        "found    none after step 6",
    ]


def test_rows_that_were_trained_on_twice_are_named(killed):
    killed.records.insert(3, killed.records[1])
    assert lines(killed.verify()) == [
        "step 2, rows [4, 8), incarnation 1: rows [4, 8) are trained on again",
        "expected step 4, rows from 12 on",
        "found    rows [4, 8) trained on at step 2",
    ]


def test_a_changed_entry_is_named(killed):
    killed.records[1][1]["checksum"] = [1, 2]
    first, expected, found = lines(killed.verify())
    assert first == "step 2, rows [4, 8), incarnation 1: this entry, or the one before it, was changed"
    assert expected.startswith("expected digest ")
    assert found == f"found    {killed.records[1][1]['digest']}"


def test_a_chain_that_was_written_anew_does_not_fit_its_acceptance(killed):
    head = killed.records[2][1]["digest"]
    killed.records[3] = (1, ledger.to_json(ledger.trained(head, Position(4, 16), 12, [1, 2])))
    assert lines(killed.verify())[0] == "step 4, rows [0, 16), incarnation 1: acceptance 1 does not fit the entries"


def test_a_step_that_consumed_something_else_is_named_and_only_where_it_is_looked_for(killed):
    def other(entry):
        return compare(entry._replace(checksum=(5, 5)) if entry.step == 3 else entry)

    assert lines(killed.verify(compare=other)) == [
        "step 3, rows [8, 12), incarnation 1: trained on something else than the shards hold",
        "expected [8084, 84]",
        "found    [5, 5]",
        "it seems a hint",
    ]
    assert killed.verify(compare=other, chosen={1, 2, 7}).compared == 3


def test_claims_and_acceptances_that_lead_nowhere_are_named(killed):
    first, second = killed.acceptances
    killed.acceptances = [second]
    assert lines(killed.verify()) == ["incarnation 2: it goes on from acceptance 1, which is not there"]
    killed.acceptances = [replace(first, incarnation=2), second]
    assert lines(killed.verify()) == ["incarnation 2: it goes on from acceptance 1, which incarnation 2 wrote"]
    killed.acceptances = [first, replace(second, incarnation=3)]
    assert lines(killed.verify()) == ["incarnation 3: acceptance 2 is of it, and it never claimed the run"]
    killed.acceptances = [first, second]
    killed.records.insert(0, (0, killed.records[0][1]))
    assert lines(killed.verify()) == ["incarnation 0: it has entries, and it never claimed the run"]


def test_an_incarnation_that_begins_while_the_ledger_is_read_is_left_for_the_next_time(killed):
    before = killed.verify()
    killed.records.append((3, killed.records[-1][1]))
    assert killed.verify() == before


def test_an_incarnation_without_a_ledger_is_not_proven_and_the_others_are(killed):
    killed.records = [(incarnation, record) for incarnation, record in killed.records if incarnation == 2]
    found = killed.verify(compare=compare)
    assert not found.holds
    assert found.contradiction is None
    assert found.unrecorded == [Steps(1, 1, 4)]
    assert (found.line, found.compared) == ([Steps(2, 5, 8)], 4)


def test_a_record_of_another_version_is_named(killed):
    killed.records[1][1]["version"] = 2
    assert lines(killed.verify())[0] == "step 1, incarnation 1: what follows its entry of step 1 is none"
    assert lines(killed.verify())[2] == "found    version 2, this program reads 1"


FIRST = "b026360e5405396a7b28ce6f4f2722c211be0ed41b913d0fece56014c4e7f132"
SECOND = "19e4dbff24c840670904216580c88b2fde5df089fa3b6d17a0a669066da98ac7"


def test_records_are_the_same_for_ever():
    entry = ledger.trained("", Position(1, 4), 0, [1, 2])
    left_out = ledger.skipped(entry.digest, Position(1, 8), 4, "loss spike")
    assert [ledger.to_json(entry), ledger.to_json(left_out)] == [
        {"version": 1, "step": 1, "rows": [0, 4], "checksum": [1, 2], "digest": FIRST},
        {"version": 1, "step": 1, "rows": [4, 8], "skipped": "loss spike", "digest": SECOND},
    ]
    assert [ledger.from_json(ledger.to_json(e)) for e in (entry, left_out)] == [entry, left_out]
