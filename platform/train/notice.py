"""Notice that machines will be taken away: heard in every phase, whoever is told, and answered by all at one step.

    SIGTERM to a worker ------------------------------.
    a node that Ray drains: by the agent on a host,    >- JAX's preemption service --> one step that no process has
    `ray drain-node`, SIGTERM to `ray start` ---------'                               passed: all save there, if it fits

Ray's announcement is asked for in a thread, because asking is a barrier of all workers; so it is heard while a step, an
evaluation, a compilation or a save goes on. The thread of process 0 passes it on to JAX in the form that JAX hears,
SIGTERM. Without notice a step costs one comparison. JAX agrees once in the life of a process group: what is announced
later is left to the cadence, which is the guarantee anyway.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

POLL_S = 1.0
ASSUMED_GRACE_S = 30.0  # of SIGTERM, which says nothing: what Google Cloud gives spot machines
# A maintenance may be announced an hour before. The later the save, the less is trained in vain.
EARLIEST_S = 60.0
EARLIEST_SAVES = 3

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What all processes make of a notice; the same in each."""

    saves: bool
    grace_s: float  # left, as the process that knows least time says
    save_s: float  # needed, as the process that needs most says; 0 if nobody has measured it


def fits(grace_s: float, save_s: float) -> bool:
    """Returns whether a save that takes `save_s` seconds is done before the machines go, `grace_s` from now."""
    return grace_s > 0 and save_s <= grace_s


def waits_s(grace_s: float, save_s: float) -> float:
    """Returns how long to train on before all are told of a notice that leaves `grace_s` seconds."""
    return max(0.0, grace_s - max(EARLIEST_S, EARLIEST_SAVES * save_s))


class Notice:
    """This process's ear, open as long as the block runs."""

    def __init__(self, announced: Callable[[], float | None], save_s: float) -> None:
        """Takes the means to hear.

        Args:
          announced: returns the Unix time at which machines of the group go, None while none is announced; called in a
            thread of its own, and equally often in all processes.
          save_s: what a save took in earlier incarnations; 0 if that is not known.
        """
        self._announced, self._save_s = announced, save_s
        self._ends_s: float | None = None
        self._stop = threading.Event()
        self._on = jax.distributed.is_initialized()

    def __enter__(self) -> Notice:
        if self._on:
            threading.Thread(target=self._listen, name="notice", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def reached(self, step: int) -> bool:
        """Returns whether this is the step at which all processes answer a notice; to be called after every step."""
        return self._on and multihost_utils.reached_preemption_sync_point(step)

    def answer(self, save_s: float) -> Answer:
        """Agrees with all processes, which call this at the same step, on whether to save now.

        Args:
          save_s: how long a save would take from now, as far as this process knows.
        """
        grace_s = ASSUMED_GRACE_S if self._ends_s is None else self._ends_s - time.time()
        mine = np.array([grace_s, save_s], np.float32)
        all_of_them = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2)
        grace_s, save_s = float(all_of_them[:, 0].min()), float(all_of_them[:, 1].max())
        return Answer(fits(grace_s, save_s), grace_s, save_s)

    def _listen(self) -> None:
        passed_on = jax.process_index() != 0
        while not self._stop.wait(POLL_S):
            try:
                ends_s = self._announced()
            except Exception as error:  # Ray's part of it is gone, and with it the group, or soon
                log.warning("no longer hears of preemptions: %s", error)
                return
            if ends_s is None or self._stop.is_set():
                continue
            self._ends_s = ends_s
            if not passed_on and waits_s(ends_s - time.time(), self._save_s) <= 0:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler takes it; it is in place since the group formed
                passed_on = True
