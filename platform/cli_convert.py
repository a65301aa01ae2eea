"""`openmoe convert`: a checkpoint in one format becomes one in another, and is held against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from openmoe.model.config import ModelConfig
    from openmoe.model.interop import Readable
    from openmoe.model.step import TrainState
    from openmoe.platform.progress import ProgressReport

Format = Literal["t5x", "hf", "orbax"]
Dtype = Literal["float32", "bfloat16"]

Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="t5x: .../checkpoint_<step>; orbax: .../<step>; hf: a folder. Local or gs://."),
]
Destination = Annotated[
    str, typer.Argument(metavar="DST", help="Folder in which the same is to appear; hf: the folder that is to appear.")
]
From = Annotated[Format, typer.Option("--from", help="Format of SRC.")]
To = Annotated[Format, typer.Option("--to", help="Format of DST.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="PRESET", help="The model, such as openmoe-8b; hf: instead of its config.json."),
]
OfParameters = Annotated[Dtype, typer.Option(help="Type of the parameters; orbax has float32 only.")]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Compare a forward pass of both, layer by layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def convert(
    source: Source,
    destination: Destination,
    source_format: From,
    destination_format: To,
    model: Model = None,
    dtype: OfParameters = "float32",
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into one of another format: t5x and orbax with the optimizer's state, hf without."""
    from openmoe.model import acceptance, hf_config
    from openmoe.platform import progress
    from openmoe.platform.spec_errors import Problem, SpecError

    if destination_format == "orbax" and dtype != "float32":
        raise SpecError([Problem("", "orbax checkpoints have float32 only; leave it out")], f"--dtype {dtype}")
    config = _config(source, source_format, model)
    if destination_format == "hf":
        hf_config.config_json(config, dtype)  # an error now, not after everything has been read
    with progress.ProgressReport() as show:
        if "hf" in (source_format, destination_format):
            path = _convert_parameters(source, source_format, destination, destination_format, config, dtype, show)
        elif source_format == destination_format == "t5x":
            path = _rewrite_t5x(source, destination, config, dtype, show)
        else:
            state = _read(source, source_format, config, show)
            path = _write(destination, destination_format, state, dtype, show)
            del state
        if check:
            both = (_parameters(source, source_format, config), _parameters(path, destination_format, config))
            found = acceptance.compare(*both, config, lambda done, total: show("check", done, total, "parts"))
            show.say(str(found))
    print(json.dumps({"path": path}) if as_json else path)


def _config(source: str, kind: Format, model: str | None) -> ModelConfig:
    from openmoe.model import hf_checkpoint
    from openmoe.model.config import PRESETS
    from openmoe.platform.spec_errors import Problem, SpecError, did_you_mean

    if model is None and kind == "hf":
        return hf_checkpoint.read_config(source)
    if model is None:
        raise SpecError([Problem("", f"needed with --from {kind}; such as --model openmoe-8b")], "--model")
    if model not in PRESETS:
        raise SpecError([Problem("", f"no preset of this name; {did_you_mean(model, PRESETS)}")], f"--model {model}")
    return PRESETS[model]


def _convert_parameters(
    source: str, kind: Format, destination: str, to: Format, config: ModelConfig, dtype: Dtype, show: ProgressReport
) -> str:
    """From or to a format without optimizer, array by array but for orbax."""
    from openmoe.model import hf_checkpoint
    from openmoe.model import t5x_checkpoint as t5x

    parameters = _parameters(source, kind, config)
    if to == "hf":
        if kind != "hf":
            show.say(f"hf has parameters only: the step and the optimizer's state of {source} stay behind")
        return hf_checkpoint.write(
            destination,
            config,
            parameters,
            dtype=dtype,
            report=lambda done, total: show("write", done, total, "arrays"),
        )
    show.say(f"hf has parameters only: {to} begins at step 0 with a fresh state of the optimizer")
    if to == "orbax":
        return _write(destination, to, _fresh_state(parameters, config, show), dtype, show)
    shapes = t5x.arrays_by_name(_template(config))
    arrays = {name: _zeros(like) for name, like in shapes.items()}
    arrays |= {f"target/{name}": array.read for name, array in parameters.items()}
    return t5x.write(destination, arrays, dtype=dtype, report=lambda done, total: show("write", done, total, "arrays"))


def _parameters(path: str, kind: Format, config: ModelConfig) -> Mapping[str, Readable]:
    """The parameters of a checkpoint by T5X's names: read when they are wanted, of orbax at once."""
    from flax import traverse_util

    from openmoe.model import hf_checkpoint, interop
    from openmoe.model import t5x_checkpoint as t5x

    wanted = traverse_util.flatten_dict(_template(config).params, sep="/")
    match kind:
        case "t5x":
            return t5x.stored_parameters(path, wanted)
        case "hf":
            return hf_checkpoint.stored_parameters(path, wanted, config)
        case "orbax":
            params = _read(path, kind, config, lambda *progress: None).params
            return {name: interop.InMemory(a) for name, a in traverse_util.flatten_dict(params, sep="/").items()}


def _fresh_state(parameters: Mapping[str, Readable], config: ModelConfig, show: ProgressReport) -> TrainState:
    import jax
    from flax import traverse_util

    template = _template(config)
    zeros = jax.tree.map(lambda like: jax.device_put(_zeros(like)(), like.sharding), template)
    placed = {}
    for name, like in traverse_util.flatten_dict(template.params, sep="/").items():
        placed[name] = jax.device_put(parameters[name].read().astype(like.dtype, copy=False), like.sharding)
        show("read", len(placed), len(parameters), "arrays")
    return zeros._replace(params=traverse_util.unflatten_dict(placed, sep="/"))


def _zeros(like: Any) -> Any:
    import numpy as np

    return lambda: np.zeros(like.shape, like.dtype)


def _read(path: str, kind: Format, config: ModelConfig, show: Callable[..., None]) -> TrainState:
    from openmoe.model import t5x_checkpoint
    from openmoe.model.checkpoint import Checkpointer
    from openmoe.pipelines import storage
    from openmoe.platform.spec_errors import Problem, SpecError

    template = _template(config)
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
        raise SpecError([Problem("", f"cannot be read as such a model: {reason[:300]}")], path) from error
    show("read", 1, 1, "checkpoints")
    return state


def _write(folder: str, kind: Format, state: TrainState, dtype: Dtype, show: ProgressReport) -> str:
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


def _rewrite_t5x(source: str, folder: str, config: ModelConfig, dtype: Dtype, show: ProgressReport) -> str:
    """Array by array, so that a model larger than this machine's memory can be rewritten in another type."""
    from openmoe.model import t5x_checkpoint as t5x

    stored = t5x.stored_arrays(source, t5x.arrays_by_name(_template(config)))
    arrays = {name: array.read for name, array in stored.items()}
    return t5x.write(folder, arrays, dtype=dtype, report=lambda done, total: show("write", done, total, "arrays"))


def _template(config: ModelConfig) -> TrainState:
    """The shapes of a state on one CPU, wherever the model is going to run."""
    import jax

    from openmoe.model import sharding, step
    from openmoe.model.config import OptimizerConfig

    mesh = sharding.make_mesh(data=1, expert=1, devices=jax.devices("cpu")[:1])
    return step.state_shapes(config, OptimizerConfig(), mesh)
