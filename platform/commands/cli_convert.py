"""`openmoe convert`: a checkpoint in one format becomes one in another, and is held against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from openmoe.model.config import ModelConfig
    from openmoe.model.interop import Readable, Report
    from openmoe.model.step import TrainState
    from openmoe.pipelines.tokenizer import Tokenizer
    from openmoe.platform.commands.progress import ProgressReport
    from openmoe.platform.run.run_dir import RunDir

Format = Literal["t5x", "hf", "orbax"]
Dtype = Literal["float32", "bfloat16"]

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="t5x: .../checkpoint_<step>; orbax: .../<step>, or a run directory; hf: a folder. Local or gs://.",
    ),
]
Destination = Annotated[
    str, typer.Argument(metavar="DST", help="Folder in which the same is to appear; hf: the folder that is to appear.")
]
From = Annotated[Format, typer.Option("--from", help="Format of SRC.")]
To = Annotated[Format, typer.Option("--to", help="Format of DST.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PRESET",
        help="The model: openmoe-8b, or that of a run directory; else what hf or SRC's run says.",
    ),
]
OfParameters = Annotated[Dtype, typer.Option(help="Type of the parameters; orbax has float32 only.")]
TokenizerModel = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        help="SentencePiece model that goes along to hf: a file, gs://, builtin:<name>; instead of SRC's own.",
    ),
]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Compare a forward pass of both, layer by layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def convert(
    source: Source,
    destination: Destination,
    source_format: From,
    destination_format: To,
    model: Model = None,
    dtype: OfParameters = "float32",
    tokenizer: TokenizerModel = None,
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into one of another format.

    Between t5x and orbax with the optimizer's state and the step; hf has parameters only.
    """
    from openmoe.model import acceptance, hf_checkpoint, t5x_checkpoint
    from openmoe.platform.commands import progress
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    if destination_format == "orbax" and dtype != "float32":
        raise SpecError([Problem("", "orbax checkpoints have float32 only; leave it out")], f"--dtype {dtype}")
    if tokenizer is not None and destination_format != "hf":
        raise SpecError([Problem("", "a tokenizer goes along to hf only; leave it out")], f"--tokenizer {tokenizer}")
    run = _run_of(source) if source_format == "orbax" else None
    if run is not None and run.path == source:
        source = _newest_of(run)
    config = run.spec().model if run is not None and model is None else _config(source, source_format, model)
    if tokenizer is None and run is not None and destination_format == "hf":
        beside = _tokenizer_of_run(run, config)
    else:
        beside = _tokenizer_files(tokenizer, config) if tokenizer is not None else _tokenizer_of(source, source_format)
    with progress.ProgressReport() as show:
        if destination_format == "hf":
            if source_format != "hf":
                show.say(f"hf has parameters only: the step and the optimizer's state of {source} stay behind")
            show.say(f"tokenizer: {', '.join(beside) or 'none goes along; --tokenizer MODEL adds one'}")
            parameters = _parameters(source, source_format, config)
            report = _counted(show, "write")
            path = hf_checkpoint.write(destination, config, parameters, dtype=dtype, beside=beside, report=report)
        else:
            if source_format == "hf":
                show.say(
                    f"hf has parameters only: {destination_format} begins at step 0 with a fresh state of the optimizer"
                )
            if beside:
                show.say(f"{destination_format} has no place for a tokenizer: {', '.join(beside)} stay behind")
            state = _state(source, source_format, config)
            if destination_format == "t5x":
                path = t5x_checkpoint.write_state(destination, state, dtype=dtype, report=_counted(show, "write"))
            else:
                path = _write_orbax(destination, state, config, show)
        if check:
            both = (_parameters(source, source_format, config), _parameters(path, destination_format, config))
            show.say(str(acceptance.compare(*both, config, _counted(show, "check", "parts"))))
    print(json.dumps({"path": path}) if as_json else path)


def _run_of(path: str) -> RunDir | None:
    """The run that a checkpoint of Orbax is of: `path` is its directory, or <run>/checkpoints/<incarnation>/<step>."""
    from openmoe.platform.run.run_dir import RunDir

    parts = path.rstrip("/").split("/")
    paths = [path, "/".join(parts[:-3]) or "."] if parts[-3:-2] == ["checkpoints"] else [path]
    return next((run for run in map(RunDir, paths) if run.exists()), None)


def _newest_of(run: RunDir) -> str:
    from openmoe.platform.run.run_dir import RunDirError

    accepted = run.newest_accepted()
    if accepted is None:
        raise RunDirError(f"{run.path}: the run has no accepted checkpoint yet; train it until its first one")
    return run.at(accepted.checkpoint)


def _config(source: str, kind: Format, model: str | None) -> ModelConfig:
    from openmoe.model import hf_checkpoint
    from openmoe.model.config import PRESETS
    from openmoe.platform.run.run_dir import RunDir
    from openmoe.platform.run_file.spec_errors import Problem, SpecError, did_you_mean

    if model is None and kind == "hf":
        return hf_checkpoint.read_config(source)
    if model is None:
        raise SpecError([Problem("", f"needed with --from {kind}; such as --model openmoe-8b")], "--model")
    if model not in PRESETS and (run := RunDir(model)).exists():
        return run.spec().model
    if model not in PRESETS:
        raise SpecError([Problem("", f"no preset of this name; {did_you_mean(model, PRESETS)}")], f"--model {model}")
    return PRESETS[model]


def _tokenizer_files(uri: str, config: ModelConfig) -> dict[str, bytes]:
    """What an export needs of a tokenizer, with as many sentinels as run files have unless they say otherwise."""
    from openmoe.pipelines import tokenizer
    from openmoe.pipelines.config import DataConfig

    return _exported(tokenizer.load(uri), DataConfig.num_sentinels, config)


def _tokenizer_of_run(run: RunDir, config: ModelConfig) -> dict[str, bytes]:
    """What an export needs of the tokenizer that a run was trained with."""
    from openmoe.platform.train import init_source

    found = init_source.tokenizer_of(run, "give it by --tokenizer")
    return _exported(found, run.spec().data.num_sentinels, config)


def _exported(model: Tokenizer, num_sentinels: int, config: ModelConfig) -> dict[str, bytes]:
    from openmoe.model import hf_tokenizer

    given = hf_tokenizer.SentencePieceModel(model.proto, model.pieces, model.eos_id, num_sentinels)
    return hf_tokenizer.files(given, config)


def _tokenizer_of(path: str, kind: Format) -> dict[str, bytes]:
    """What a checkpoint has of a tokenizer, as it is: only one of Hugging Face may have one."""
    from openmoe.model import hf_tokenizer

    return hf_tokenizer.files_in(path) if kind == "hf" else {}


def _parameters(path: str, kind: Format, config: ModelConfig) -> Mapping[str, Readable]:
    """The parameters of a checkpoint by T5X's names, read when they are wanted."""
    from flax import traverse_util

    from openmoe.model import checkpoint, hf_checkpoint
    from openmoe.model import t5x_checkpoint as t5x

    template = _template(config)
    wanted = traverse_util.flatten_dict(template.params, sep="/")
    match kind:
        case "t5x":
            return t5x.stored_parameters(path, wanted)
        case "hf":
            return hf_checkpoint.stored_parameters(path, wanted, config)
        case "orbax":
            return traverse_util.flatten_dict(checkpoint.stored_parameters(path, template.params), sep="/")


def _state(path: str, kind: Format, config: ModelConfig) -> Any:
    """The arrays of a checkpoint in their places in a TrainState, read when they are wanted."""
    import jax
    from flax import traverse_util

    from openmoe.model import checkpoint, interop, t5x_checkpoint

    template = _template(config)
    match kind:
        case "t5x":
            return t5x_checkpoint.stored(path, template)
        case "orbax":
            return checkpoint.stored(path, template)
        case "hf":
            fresh = jax.tree.map(lambda like: interop.Zeros(like.shape, like.dtype), template)
            parameters = dict(_parameters(path, kind, config))
            return fresh._replace(params=traverse_util.unflatten_dict(parameters, sep="/"))


def _write_orbax(folder: str, state: Any, config: ModelConfig, show: ProgressReport) -> str:
    from openmoe.model import checkpoint
    from openmoe.pipelines import storage
    from openmoe.platform.run_file.spec_errors import Problem, SpecError

    path = storage.join(folder, str(step := int(state.step.read())))
    if storage.exists(path):
        raise SpecError([Problem("", "is there already; remove it, or choose another folder")], path)
    checkpoint.write(folder, step, state, _template(config), {"next_row": 0}, _counted(show, "write"))
    return path


def _counted(show: ProgressReport, what: str, of: str = "arrays") -> Report:
    return lambda done, total: show(what, done, total, of)


def _template(config: ModelConfig) -> TrainState:
    """The shapes of a state on one CPU, wherever the model is going to run."""
    import jax

    from openmoe.model import sharding, step
    from openmoe.model.optimizer_config import AdafactorConfig

    mesh = sharding.make_mesh(data=1, expert=1, devices=jax.devices("cpu")[:1])
    return step.state_shapes(config, AdafactorConfig(), mesh)
