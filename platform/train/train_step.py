"""The jitted step as the loop calls it: counted, its first call charged to compiling, and told as text on request."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from openmoe.platform.train.compile_cache import Programs
from openmoe.platform.train.recorder import Recorder


class TrainStep:
    """Calls the step of `model.step.make_train_step`.

    Attributes:
      calls: so far; an asynchronous call counts when it begins.
    """

    def __init__(self, function: Any, recorder: Recorder, programs: Programs) -> None:
        """Takes the step, who is told of its first call, and the programs, which are counted then."""
        self.calls = 0
        self._function, self._recorder, self._programs = function, recorder, programs
        self._shapes: Any = None

    def __call__(self, state: Any, batch: Any) -> Any:
        """Does a step; a profile shows it by its number in this incarnation. What was compiled before it is kept."""
        self.calls += 1
        self._programs.keep_new()
        if self.calls == 1:
            self._shapes = jax.tree.map(_shape, (state, batch))
            self._programs.tell()
        charge = self._recorder.charged("compile") if self.calls == 1 else contextlib.nullcontext()
        with charge, jax.profiler.StepTraceAnnotation("train", step_num=self.calls):
            result = self._function(state, batch)
        if self.calls == 1:
            self._programs.tell()
        return result

    def text(self) -> str:
        """Returns the compiled step as XLA shows it: compiled once more, or from the compile cache."""
        if self._shapes is None:
            raise RuntimeError("no step has begun yet, so that its shapes are not known")
        return self._function.lower(*self._shapes).compile().as_text()


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
