"""The state with which a run begins: drawn from its seed, or with the parameters of another run or a conversion."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from openmoe.model import checkpoint, interop, step
from openmoe.platform.run.run_dir import RunDir, RunDirError
from openmoe.platform.run_file import spec as spec_file
from openmoe.platform.train import restore

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from openmoe.platform.run_file.spec import RunSpec


def initial_state(
    spec: RunSpec, mesh: Mesh, event: Callable[..., object] = lambda kind, **facts: None
) -> step.TrainState:
    """Returns the plain state of step 0; where its parameters are another's, an event says so with their digest.

    Raises:
      RunDirError: there is no such checkpoint, it is of another model, or its bits are not those that were accepted.
    """
    if spec.init_from is None:
        return step.init_state(spec.model, spec.optimizer, spec.seed, mesh)
    start_s, source = time.time(), RunDir(spec.init_from)
    template = step.state_shapes(spec.model, spec.optimizer, mesh).params
    try:
        if source.exists():
            path, params = _accepted(source, template, mesh)
        else:
            path = spec.init_from
            params = interop.placed(checkpoint.stored_parameters(path, template), template)
    except interop.CheckpointError as error:
        raise RunDirError(f"init_from: {error}") from error
    event("initialized", checkpoint=path, digest=checkpoint.checksum(params), seconds=time.time() - start_s)
    return step.fresh_state(spec.model, spec.optimizer, mesh, params)


def _accepted(source: RunDir, template: Any, mesh: Mesh) -> tuple[str, Any]:
    """Returns the newest accepted checkpoint of a run, and its parameters, having compared all its bits."""
    accepted = source.newest_accepted()
    if accepted is None:
        raise RunDirError(f"init_from: {source.path}: the run has no accepted checkpoint yet; train it first")
    path = source.at(accepted.checkpoint)
    checkpoint.stored_parameters(path, template)  # says in one line how another model differs
    theirs = spec_file.RunSpec.model_validate_json(json.dumps(source.record()["spec"]))
    try:
        state, _ = restore.restored(source, accepted, step.state_shapes(theirs.model, theirs.optimizer, mesh))
    except restore.DamagedCheckpoint as error:  # not one of this run: nothing to go back from
        raise RunDirError(f"init_from: {source.path}: {error}") from error
    return path, state.params
