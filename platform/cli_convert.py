"""`openmoe convert`: a checkpoint in one format becomes one in another."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from openmoe.model.step import TrainState
    from openmoe.platform.progress import ProgressReport

Format = Literal["t5x", "orbax"]
Dtype = Literal["float32", "bfloat16"]

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="t5x: .../checkpoint_<step>; orbax: .../<step>. Local or gs://.")
]
Destination = Annotated[str, typer.Argument(metavar="DST", help="Folder in which the same is to appear.")]
From = Annotated[Format, typer.Option("--from", help="Format of SRC.")]
To = Annotated[Format, typer.Option("--to", help="Format of DST.")]
Model = Annotated[str, typer.Option("--model", metavar="PRESET", help="The model, such as openmoe-8b.")]
OfParameters = Annotated[Dtype, typer.Option(help="Type of the parameters; orbax has float32 only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def convert(
    source: Source,
    destination: Destination,
    source_format: From,
    destination_format: To,
    model: Model,
    dtype: OfParameters = "float32",
    as_json: Json = False,
) -> None:
    """Turn a checkpoint, optimizer included, into one of another format."""
    from openmoe.model.config import PRESETS
    from openmoe.platform import progress
    from openmoe.platform.spec_errors import Problem, SpecError, did_you_mean

    if model not in PRESETS:
        raise SpecError([Problem("", f"no preset of this name; {did_you_mean(model, PRESETS)}")], f"--model {model}")
    if destination_format == "orbax" and dtype != "float32":
        raise SpecError([Problem("", "orbax checkpoints have float32 only; leave it out")], f"--dtype {dtype}")
    with progress.ProgressReport() as show:
        if source_format == destination_format == "t5x":
            path = _rewrite_t5x(source, destination, model, dtype, show)
        else:
            state = _read(source, source_format, model, show)
            path = _write(destination, destination_format, state, dtype, show)
    print(json.dumps({"path": path}) if as_json else path)


def _read(path: str, kind: Format, model: str, show: "ProgressReport") -> "TrainState":
    from openmoe.model import t5x_checkpoint
    from openmoe.model.checkpoint import Checkpointer
    from openmoe.pipelines import storage
    from openmoe.platform.spec_errors import Problem, SpecError

    template = _template(model)
    if kind == "t5x":
        return t5x_checkpoint.restore(path, template, lambda done, total: show("read", done, total, "arrays"))
    folder, _, step = path.rstrip("/").rpartition("/")
    if not step.isdecimal() or not storage.exists(path):
        raise SpecError([Problem("", "no checkpoint of Orbax; give the path of one step, such as DIR/1000")], path)
    show("read", 0, 1, "checkpoints")
    try:
        state, _ = Checkpointer(folder or ".").restore(int(step), template)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise SpecError([Problem("", f"cannot be read as {model}: {reason[:300]}")], path) from error
    show("read", 1, 1, "checkpoints")
    return state


def _write(folder: str, kind: Format, state: "TrainState", dtype: Dtype, show: "ProgressReport") -> str:
    from openmoe.model import t5x_checkpoint
    from openmoe.model.checkpoint import Checkpointer
    from openmoe.pipelines import storage
    from openmoe.platform.spec_errors import Problem, SpecError

    if kind == "t5x":
        return t5x_checkpoint.save(
            folder, state, dtype=dtype, report=lambda done, total: show("write", done, total, "arrays")
        )
    path = storage.join(folder, str(int(state.step)))
    if storage.exists(path):
        raise SpecError([Problem("", "is there already; remove it, or choose another folder")], path)
    show("write", 0, 1, "checkpoints")
    checkpointer = Checkpointer(folder)
    checkpointer.save(int(state.step), state, {"next_row": 0})
    checkpointer.wait()
    show("write", 1, 1, "checkpoints")
    return path


def _rewrite_t5x(source: str, folder: str, model: str, dtype: Dtype, show: "ProgressReport") -> str:
    """Array by array, so that a model larger than this machine's memory can be rewritten in another type."""
    from openmoe.model import t5x_checkpoint as t5x

    stored = t5x.stored_arrays(source, t5x.arrays_by_name(_template(model)))
    arrays = {name: array.read for name, array in stored.items()}
    return t5x.write(folder, arrays, dtype=dtype, report=lambda done, total: show("write", done, total, "arrays"))


def _template(model: str) -> "TrainState":
    """The shapes of a state on one CPU, wherever the model is going to run."""
    import jax

    from openmoe.model import sharding, step
    from openmoe.model.config import PRESETS, OptimizerConfig

    mesh = sharding.make_mesh(data=1, expert=1, devices=jax.devices("cpu")[:1])
    return step.state_shapes(PRESETS[model], OptimizerConfig(), mesh)
