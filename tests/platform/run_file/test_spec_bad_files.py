"""Bad run files: each ends in one line a problem, with place, dotted path, value, bound and remedy."""

import pytest

from openmoe.platform.run_file import spec
from openmoe.platform.run_file.spec_errors import SpecError

GOOD = """\
name: tiny
run_dir: openmoe-runs/tiny
model:
  preset: openmoe-nano
data:
  tokenizer: builtin:small_8192
  seq_len: 512
  sources:
    - name: wikipedia
      format: redpajama
      paths: [corpus/*.jsonl]
      weight: 1
train:
  steps: 100
  batch_rows: 4
  checkpoint_every_steps: 10
mesh:
  expert: 4
cluster:
  num_workers: 2
  devices_per_worker: 2
"""

TOP = (
    "name, run_dir, data_dir, sample_corpus, init_from, seed, model, data, train, optimizer, mesh, execution, cluster, "
    "budgets, trackers, health, eval"
)

SHIPPED = "openmoe_8b, openmoe_8b_chat, quickstart, twin"

# name: (text in GOOD, what stands there instead, the whole message after "<file>:")
WORDS = {
    "exponent without a dot": (
        "steps: 100\n",
        "steps: 1e6\n",
        "14: train.steps: '1e6' is text in YAML 1.1; write 1000000, or '1e6' in quotes for text",
    ),
    "exponent without a sign": (
        "weight: 1\n",
        "weight: 1.5e3\n",
        "12: data.sources.0.weight: '1.5e3' is text in YAML 1.1; write 1500, or '1.5e3' in quotes for text",
    ),
    "small exponent": (
        "weight: 1\n",
        "weight: 1e-5\n",
        "12: data.sources.0.weight: '1e-5' is text in YAML 1.1; write 1.0e-05, or '1e-5' in quotes for text",
    ),
    "no": (
        "name: tiny",
        "name: no",
        "1: name: YAML 1.1 reads no as false; write false for a boolean, or 'no' in quotes for text",
    ),
    "on": (
        "steps: 100\n",
        "steps: on\n",
        "14: train.steps: YAML 1.1 reads on as true; write true for a boolean, or 'on' in quotes for text",
    ),
    "Off": (
        "name: wikipedia",
        "name: Off",
        "9: data.sources.0.name: YAML 1.1 reads Off as false; write false for a boolean, or 'Off' in quotes for text",
    ),
    "True": (
        "name: tiny",
        "name: True",
        "1: name: True is not spelt alike everywhere; write true, or 'True' in quotes for text",
    ),
    "octal of YAML 1.2": (
        "steps: 100\n",
        "steps: 0o17\n",
        "14: train.steps: 0o17 is 15 to some YAML readers and 17 to others; write either, or '0o17' in quotes for text",
    ),
    "octal of YAML 1.1": (
        "steps: 100\n",
        "steps: 017\n",
        "14: train.steps: 017 is 15 to some YAML readers and 17 to others; write either, or '017' in quotes for text",
    ),
    "digit groups": (
        "steps: 100\n",
        "steps: 1_000\n",
        "14: train.steps: 1_000 is text to some YAML readers; write 1000, or '1_000' in quotes for text",
    ),
    "hexadecimal": (
        "steps: 100\n",
        "steps: 0x64\n",
        "14: train.steps: 0x64 is text to some YAML readers; write 100, or '0x64' in quotes for text",
    ),
    "base 60": (
        "steps: 100\n",
        "steps: 1:30\n",
        "14: train.steps: YAML 1.1 reads 1:30 as a base-60 number; write the number in the key's unit, "
        "or '1:30' in quotes for text",
    ),
    "date": (
        "name: tiny",
        "name: 2026-11-23",
        "1: name: YAML 1.1 reads 2026-11-23 as a date; no field is a date, or '2026-11-23' in quotes for text",
    ),
    "not a number": (
        "weight: 1\n",
        "weight: .nan\n",
        "12: data.sources.0.weight: .nan is not a finite number; write a finite one, or '.nan' in quotes for text",
    ),
    "infinite": (
        "weight: 1\n",
        "weight: -.inf\n",
        "12: data.sources.0.weight: -.inf is not a finite number; write a finite one, or '-.inf' in quotes for text",
    ),
    "overflow": (
        "weight: 1\n",
        "weight: 1.0e+999\n",
        "12: data.sources.0.weight: '1.0e+999' is too large a number; write a smaller one, "
        "or '1.0e+999' in quotes for text",
    ),
    "merge key": (
        "mesh:\n",
        "mesh:\n  <<: {data: 1}\n",
        "18: mesh.<<: as a key, << has a meaning of its own to some YAML readers; write the keys out, "
        "or '<<' in quotes for text",
    ),
    "key twice": (
        "steps: 100\n",
        "steps: 100\n  steps: 200\n",
        "15: train.steps: given twice (lines 14 and 15); keep one",
    ),
    "section twice": (
        "mesh:\n",
        "mesh:\n  expert: 4\nmesh:\n",
        "19: mesh: given twice (lines 17 and 19); keep one",
    ),
}

KEYS_AND_TYPES = {
    "unknown key with a near one": (
        "batch_rows: 4\n",
        "batch_rows: 4\n  microbatch: 2\n",
        "16: train.microbatch: unknown key; did you mean `microbatches`?",
    ),
    "unknown key of a source": (
        "weight: 1\n",
        "weight: 1\n      wight: 2\n",
        "13: data.sources.0.wight: unknown key; did you mean `weight`?",
    ),
    "unknown key of the model": (
        "preset: openmoe-nano\n",
        "preset: openmoe-nano\n  n_layers: 2\n",
        "5: model.n_layers: unknown key; did you mean `num_layers`?",
    ),
    "unknown section": ("mesh:\n", "zzz: 1\nmesh:\n", f"17: zzz: unknown key; known: {TOP}"),
    "missing key": ("  steps: 100\n", "", "13: train.steps: missing; add `steps:` or `epochs:` to `train`"),
    "missing section": ("name: tiny\n", "", " name: missing; add `name:` to the file"),
    "second seed": (
        "seq_len: 512\n",
        "seq_len: 512\n  seed: 3\n",
        "8: data.seed: a run has one seed; write it as the top-level `seed`",
    ),
    "empty value": (
        "steps: 100\n",
        "steps:\n",
        "14: train.steps: missing; add `steps:` or `epochs:` to `train`",
    ),
    "text for a number": (
        "steps: 100\n",
        "steps: many\n",
        "14: train.steps: expected an integer, got 'many'",
    ),
    "number in quotes": (
        "steps: 100\n",
        "steps: '100'\n",
        "14: train.steps: expected an integer, got '100'; take the quotes off: 100",
    ),
    "float for an integer": (
        "batch_rows: 4\n",
        "batch_rows: 4.0\n",
        "15: train.batch_rows: expected an integer, got 4.0; write 4",
    ),
    "number for text": ("name: tiny", "name: 7", '1: name: expected text, got 7; write it in quotes: "7"'),
    "boolean for a number": (
        "steps: 100\n",
        "steps: true\n",
        "14: train.steps: expected an integer, got true",
    ),
    "text for a list": (
        "paths: [corpus/*.jsonl]",
        "paths: corpus/*.jsonl",
        "11: data.sources.0.paths: expected a list, got 'corpus/*.jsonl'; write [corpus/*.jsonl]",
    ),
    "number for a section": (
        "mesh:\n  expert: 4\n",
        "mesh: 4\n",
        "17: mesh: expected a mapping, got 4; indent its keys below it",
    ),
    "preset without its key": (
        "model:\n  preset: openmoe-nano\n",
        "model: openmoe-nano\n",
        "3: model: expected a mapping; write `model: {preset: openmoe-nano}`",
    ),
    "unknown preset": (
        "openmoe-nano",
        "openmoe-8",
        "4: model.preset: no preset 'openmoe-8'; did you mean `openmoe-8b`?",
    ),
    "preset that is a list": (
        "openmoe-nano",
        "[openmoe-nano]",
        "4: model.preset: no preset a list; did you mean `openmoe-nano`?",
    ),
    "dotted key": ("mesh:\n", "train.steps: 3\nmesh:\n", "17: train.steps: unknown key; did you mean `train`?"),
    "seed too large": ("name: tiny", "name: tiny\nseed: 3000000000", "2: seed: must be < 2147483648, got 3000000000"),
    "settings of a model without a preset": (
        "preset: openmoe-nano",
        "{d_model: 8, d_ff: 8, num_layers: 2, num_heads: 1, head_dim: 8, num_experts: 4, moe_every: 2}",
        "3: model: missing text_vocab_size, vocab_size; add them, or `preset:` (one of openmoe-base, "
        "openmoe-8b, openmoe-34b, openllama-base, openllama-large, openmoe-nano, "
        "openmoe-next-nano, openmoe-next-base, openmoe-next-8b)",
    ),
    "choice misspelt": (
        "format: redpajama",
        "format: redpyjama",
        "10: data.sources.0.format: must be one of redpajama, the_stack, text, chat; got 'redpyjama'; "
        "did you mean `redpajama`?",
    ),
    "zero steps": ("steps: 100\n", "steps: 0\n", "14: train.steps: must be >= 1, got 0"),
    "zero weight": (
        "weight: 1\n",
        "weight: 0\n",
        "12: data.sources.0.weight: must be above 0, got 0.0; leave the source out instead",
    ),
    "name with a space": (
        "name: tiny",
        "name: my run",
        "1: name: must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$, got 'my run'",
    ),
}

COMBINATIONS = {
    "mesh of another size than the cluster": (
        "expert: 4",
        "expert: 2",
        "17: mesh: data=1 x expert=2 is 2 devices, the cluster has num_workers=2 x devices_per_worker=2 = 4",
    ),
    "experts not divided evenly": (
        "preset: openmoe-nano\n",
        "preset: openmoe-nano\n  num_experts: 6\n",
        "19: mesh.expert: must divide model.num_experts=6, got 4",
    ),
    "uneven microbatches": (
        "batch_rows: 4\n",
        "batch_rows: 4\n  microbatches: 3\n",
        "16: train.microbatches: must divide train.batch_rows=4, got 3",
    ),
    "rows not divided evenly": (
        "batch_rows: 4\n",
        "batch_rows: 6\n",
        "15: train.batch_rows: 6 rows a microbatch cannot be divided over 4 devices (mesh); "
        "make batch_rows a multiple of 4, got 6",
    ),
    "half a routing group on a device": (
        "preset: openmoe-nano\n",
        "preset: openmoe-nano\n  group_size: 1024\n",
        "5: model.group_size: must divide the 512 tokens a device holds of a microbatch (1 rows x 512), "
        "got 1024; use fewer devices, fewer microbatches or smaller groups (which changes the mathematics)",
    ),
    "expert axis for a dense model": (
        "preset: openmoe-nano\n",
        "preset: openllama-base\n",
        "18: mesh.expert: must be 1 for a dense model (num_experts=0), got 4",
    ),
    "no room for the sentinels": (
        "preset: openmoe-nano\n",
        "preset: openmoe-nano\n  vocab_size: 8320\n",
        "5: model.vocab_size: must be >= 8492 (text_vocab_size=8192 + data.num_sentinels=300), got 8320",
    ),
    "never a checkpoint": (
        "checkpoint_every_steps: 10",
        "checkpoint_every_steps: 101",
        "16: train.checkpoint_every_steps: must be <= train.steps=100, got 101",
    ),
    "sample longer than a row": (
        "steps: 100\n",
        "steps: 100\n  sample_tokens: 512\n",
        "15: train.sample_tokens: must be < data.seq_len=512, got 512",
    ),
    "topology without a tpu": (
        "num_workers: 2",
        "topology: 2x2\n  num_workers: 2",
        "20: cluster.topology: only means something when accelerator is tpu (it is cpu); remove it",
    ),
    "tpu without accelerator_type": (
        "num_workers: 2",
        "accelerator: tpu\n  topology: 2x2\n  num_workers: 2",
        "19: cluster.accelerator_type: needed when accelerator is tpu; add it, such as `accelerator_type: TPU-V4`",
    ),
    "a TPU by Google's name and not by Ray's": (
        "num_workers: 2",
        "accelerator: tpu\n  accelerator_type: TPU-V5E\n  topology: 4x4\n  num_workers: 2",
        "21: cluster.accelerator_type: must be one of TPU-V4, TPU-V5P, TPU-V5LITEPOD, TPU-V6E, TPU-V7X, got TPU-V5E",
    ),
    "a slice that does not exist": (
        "num_workers: 2",
        "accelerator: tpu\n  accelerator_type: TPU-V6E\n  topology: 3x3\n  num_workers: 2",
        "22: cluster.topology: no v6e slice is 3x3; write one of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    ),
    "half of a slice": (
        "num_workers: 2",
        "accelerator: tpu\n  accelerator_type: TPU-V6E\n  topology: 4x4\n  num_workers: 2",
        "23: cluster.num_workers: must be a multiple of the 4 hosts of a v6e slice of 4x4, got 2",
    ),
}


TWO_SOURCES = """\
  sources:
    - {name: wikipedia, format: redpajama, paths: [w/*.jsonl]}
    - {name: the-stack, format: the_stack, paths: [s/*.parquet]}
  stages:
"""


def stages(*lines):
    """The sources of GOOD and instead of them two without weights, with `lines` as the stages from line 12 on."""
    old = GOOD[GOOD.index("  sources:") : GOOD.index("train:")]
    return old, TWO_SOURCES + "".join(f"    - {{{line}}}\n" for line in lines)


BOTH = "weights: {wikipedia: 1, the-stack: 1}"
LENGTHS_AND_STAGES = {
    "steps and epochs": (
        "steps: 100\n",
        "steps: 100\n  epochs: 2\n",
        "15: train.epochs: a run has steps or epochs, got steps=100 too; remove one (or train.steps=null)",
    ),
    "a batch in rows and in tokens": (
        "  batch_rows: 4\n",
        "  batch_rows: 4\n  batch_tokens: 2048\n",
        "16: train.batch_tokens: a step has batch_rows or batch_tokens, got batch_rows=4 too; remove one",
    ),
    "tokens that are no whole rows": (
        "  batch_rows: 4\n",
        "  batch_tokens: 2000\n",
        "15: train.batch_tokens: must be a multiple of data.seq_len=512, whole rows, got 2000",
    ),
    "no epoch": ("steps: 100\n", "epochs: 0\n", "14: train.epochs: must be > 0.0, got 0"),
    "no weight and no stages": (
        "      weight: 1\n",
        "",
        "9: data.sources.0.weight: missing; add `weight:` to the source",
    ),
    "weights in two places": (
        "      weight: 1\n",
        "      weight: 1\n  stages: [{weights: {wikipedia: 1}}]\n",
        "12: data.sources.0.weight: the weights are in `stages`; remove this one",
    ),
    "a stage of an unknown source": (
        *stages("weights: {wikipedai: 1}"),
        "12: data.stages.0.weights: no source is named 'wikipedai'; the sources are wikipedia, the-stack",
    ),
    "a source in no stage": (
        *stages("until_tokens: 512, weights: {wikipedia: 1}", "weights: {wikipedia: 2, the-stack: 0}"),
        "8: data.sources: the-stack has no weight in any stage; give it one or leave it out",
    ),
    "a stage of nothing": (
        *stages("until_tokens: 512, weights: {wikipedia: 0}", BOTH),
        "12: data.stages.0.weights: at least one source needs a weight above 0, got none",
    ),
    "a negative weight": (
        *stages("weights: {wikipedia: 1, the-stack: -1}"),
        "12: data.stages.0.weights: the-stack must be at least 0, got -1.0",
    ),
    "a weight too small for a row": (
        *stages("weights: {wikipedia: 1, the-stack: 0.0001}"),
        "12: data.stages.0.weights: the-stack has weight 0.0001 of 1.0001, less than one row in 2000; "
        "give it at least 0.00050005 or leave it out",
    ),
    "half a row": (
        *stages(f"until_tokens: 1300, {BOTH}", BOTH),
        "12: data.stages.0.until_tokens: must be whole rows of seq_len=512, such as 1024, got 1300",
    ),
    "stages that run backwards": (
        *stages(f"until_tokens: 5120, {BOTH}", f"until_tokens: 1024, {BOTH}", BOTH),
        "13: data.stages.1.until_tokens: must be > 5120, the end before it, got 1024",
    ),
    "a stage without an end before another": (
        *stages(BOTH, BOTH),
        "12: data.stages.0.until_tokens: missing; only the last stage has no end",
    ),
    "an end of the last stage": (
        *stages(f"until_tokens: 5120, {BOTH}"),
        "12: data.stages.0.until_tokens: the last stage goes on to the end of the run; remove it, got 5120",
    ),
    "an objective that is not known": (
        *stages(f"objective: next_tokens, {BOTH}"),
        "12: data.stages.0.objective: must be one of ul2, next_token, prefix_lm, chat; got 'next_tokens'; "
        "did you mean `next_token`?",
    ),
    "an objective beside stages": (
        stages(BOTH)[0],
        "  objective: next_token\n" + stages(BOTH)[1],
        "8: data.objective: the objectives are in `stages`; remove this one, got 'next_token'",
    ),
    "stages of a model that is not known": (
        "      weight: 1\n",
        "  stages: openmoe-8\n",
        "12: data.stages: no stages 'openmoe-8'; did you mean `openmoe-8b`?",
    ),
    "a source of an original model that is not there": (
        stages(BOTH)[0],
        TWO_SOURCES.replace("the-stack", "c4").replace("  stages:\n", "  stages: openmoe-8b\n"),
        "11: data.stages.0.weights: no source is named 'stackexchange'; the sources are wikipedia, c4",
    ),
    "reference packing of nothing": (
        "  seq_len: 512\n",
        "  seq_len: 512\n  objective: prefix_lm\n  packing: reference\n",
        "9: data.packing: reference is a way to pack objective ul2, which is not used; remove it",
    ),
    "an unknown key of a stage": (
        *stages(f"until_token: 512, {BOTH}", BOTH),
        "12: data.stages.0.until_token: unknown key; did you mean `until_tokens`?",
    ),
    "text for a stage's weight": (
        *stages("weights: {wikipedia: much}"),
        "12: data.stages.0.weights.wikipedia: expected a number, got 'much'",
    ),
}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(*case, id=name)
        for name, case in (WORDS | KEYS_AND_TYPES | COMBINATIONS | LENGTHS_AND_STAGES).items()
    ],
)
def test_a_bad_setting_is_named_with_its_line_and_remedy(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    file = tmp_path / "run.yaml"
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(SpecError) as caught:
        spec.load(str(file))
    assert str(caught.value) == f"{file}:{message}"


WHOLE_FILES = {
    "empty": (b"", " a run file is a mapping of settings, this is nothing; start from runs/quickstart.yaml"),
    "comments only": (
        b"# nothing\n",
        " a run file is a mapping of settings, this is nothing; start from runs/quickstart.yaml",
    ),
    "a list": (
        b"- a\n",
        " a run file is a mapping of settings, this is a list; start from runs/quickstart.yaml",
    ),
    "a word": (b"quickstart\n", " a run file is a mapping of settings, this is 'quickstart'; start from"),
    "a tab": (b"train:\n\tsteps: 3\n", "2: a tab in the indentation; YAML allows spaces only"),
    "an open bracket": (b"paths: [a, b\nx: 1\n", "2: not YAML: did not find expected ',' or ']'; look at"),
    "an open quote": (b"name: 'a\n", "2: not YAML: found unexpected end of stream; look at this line"),
    "two colons": (b"a: b: c\n", "1: not YAML: mapping values are not allowed in this context; look at"),
    "two documents": (b"a: 1\n---\nb: 2\n", "3: more than one document (`---`); keep one"),
    "an anchor": (b"a: &x 1\nb: 2\n", "1: anchors are not allowed; remove `&x`"),
    "an alias": (b"a: *x\n", "1: aliases are not allowed; write out what `*x` stands for"),
    "a tag": (b"a: !!python/object/apply:os.system [ls]\n", "1: tags are not allowed; remove `tag:yaml.org,"),
    "a key that is a list": (b"? [a]\n: 1\n", "1: the file: a key must be a word"),
    "deep nesting": (b"a: " + b"[" * 500_000, "1: a.0.0.0.0.0.0.0.0.0.0.0.0: nested deeper than 12 levels"),
    "latin-1": ("name: caf\u00e9\n".encode("latin-1"), " not UTF-8 (byte 9 is 0xe9); save it as UTF-8"),
    "utf-16": ("name: a\n".encode("utf-16"), " not UTF-8 (byte 0 is 0xff); save it as UTF-8"),
    "a zero byte": (b"name: a\0b\n", " not readable as YAML: unacceptable character #x0000"),
    "10 MB": (b"# " + b"x" * 10_000_000, " larger than 1000000 bytes; a run file is a page of settings"),
}


@pytest.mark.parametrize(("content", "message"), [pytest.param(*case, id=name) for name, case in WHOLE_FILES.items()])
def test_a_file_that_is_no_run_file_is_refused_whole(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        spec.load(str(file))
    assert str(caught.value).startswith(f"{file}:{message}")
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_ends_at_its_first_anchor(tmp_path):
    levels = [f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]" for n in range(1, 9)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(["x1: &x1 [lol]", *levels]))
    with pytest.raises(SpecError, match=r"bomb\.yaml:1: anchors are not allowed"):
        spec.load(str(file))


def test_all_problems_of_a_file_are_reported_together(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        GOOD.replace("steps: 100\n", "steps: 1e6\n").replace("weight: 1", "weight: -1").replace("name: tiny", "nam: a")
    )
    with pytest.raises(SpecError) as caught:
        spec.load(str(file))
    assert [problem.path for problem in caught.value.problems] == [
        "train.steps",
        "name",
        "data.sources.0.weight",
        "nam",
    ]
    assert len(str(caught.value).splitlines()) == 4


def test_a_flood_of_problems_is_cut_to_a_screenful(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD + "".join(f"key{n}: 1\n" for n in range(500)))
    with pytest.raises(SpecError) as caught:
        spec.load(str(file))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == f"{file}: and 480 problems more"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "missing.yaml",
            f"missing.yaml: no such file; give its path, or a shipped name ({SHIPPED})",
        ),
        ("/tmp", "/tmp: a folder, not a run file; give a file such as runs/quickstart.yaml"),
        (f"./{'a' * 300}.yaml", f"./{'a' * 300}.yaml: cannot be read: File name too long"),
        ("quikstart", "quikstart: no run file of this name is shipped; did you mean `quickstart`?"),
    ],
)
def test_a_file_that_is_not_there_is_named(path, message):
    with pytest.raises(SpecError) as caught:
        spec.load(path)
    assert str(caught.value) == message


OVERRIDES = {
    "no equals sign": (
        "train.steps",
        ": override 'train.steps': expected key.path=value, such as train.steps=200",
    ),
    "no value": (
        "train.steps=",
        ": override 'train.steps=': expected key.path=value, such as train.steps=200",
    ),
    "empty key": ("train..steps=1", ": override 'train..steps=1': expected key.path=value, such as"),
    "unknown key": ("train.stps=3", "train.stps: unknown key; did you mean `steps`?"),
    "unknown section": ("trian.steps=3", "trian: unknown key; did you mean `train`?"),
    "wrong type": ("train.steps=many", "train.steps: expected an integer, got 'many'"),
    "trap": (
        "train.steps=1e3",
        "train.steps: '1e3' is text in YAML 1.1; write 1000, or '1e3' in quotes for text",
    ),
    "trap inside a list": (
        "data.sources.0.paths=[no]",
        "data.sources.0.paths.0: YAML 1.1 reads no as false;",
    ),
    "below a number": ("name.x=1", "name.x: `name` is 'tiny', nothing lies below it; set `name` itself"),
    "past the end of a list": (
        "data.sources.1.weight=2",
        "data.sources.1.weight: `data.sources` has no entry 1; it has 1, counted from 0",
    ),
    "not YAML": ("name=[a", "override 'name=[a': not YAML: did not find expected ',' or ']';"),
    "impossible": ("mesh.expert=8", "mesh: data=1 x expert=8 is 8 devices, the cluster has num_workers=2 x"),
}


@pytest.mark.parametrize(("override", "message"), [pytest.param(*case, id=name) for name, case in OVERRIDES.items()])
def test_a_bad_override_is_named_with_its_remedy(tmp_path, override, message):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    with pytest.raises(SpecError) as caught:
        spec.load(str(file), [override])
    assert message in str(caught.value)
