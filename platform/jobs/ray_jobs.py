"""A cluster's Ray jobs over HTTP: submit, look, stop, read logs.

The only file that imports ray.job_submission. Every call ends within seconds, also when nobody answers, and
repeating one is harmless: a submission id names one job for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

CONNECT_TIMEOUT_S = 3.0
_NOT_FOUND = 404
# Ray would follow these instead of the address it is given.
_MISLEADING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)

RayStatus = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
T = TypeVar("T")


class RayJobsError(ValueError):
    """A cluster did not do what it was asked; the message names the cluster and the reason."""


class ClusterUnreachable(RayJobsError):
    """Nobody answers at the cluster's address, or not to us: nothing is known about its jobs."""


class Refused(RayJobsError):
    """The cluster answered and would not do it; `status_code` is of its HTTP answer."""

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.status_code = status_code

    @property
    def is_retryable(self) -> bool:
        """Whether it may well do it later: the fault was its own, such as a head that is still starting."""
        return self.status_code >= 500


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """What Ray says about one submission.

    Attributes:
      status: PENDING, RUNNING, or one of the ends STOPPED, SUCCEEDED, FAILED.
      exit_code: of the driver's process; None while it runs, or when it never ended by itself.
      message: Ray's words; of a failed job, with the last lines of its log.
      error_type: Ray's name of the failure, such as JOB_ENTRYPOINT_COMMAND_ERROR.
    """

    status: RayStatus
    exit_code: int | None
    message: str
    error_type: str

    @property
    def has_ended(self) -> bool:
        """Whether Ray will not change its mind any more."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class RayJobs:
    """The jobs of the Ray cluster whose dashboard is at `address` ("http://host:8265").

    Args:
      address: of the dashboard.
      token: what the cluster wants to see; "" where authentication is off.
      timeout_s: silence after which nobody answers.

    Raises:
      ClusterUnreachable: nobody answers there.
    """

    def __init__(self, address: str, token: str, *, timeout_s: float = 15.0) -> None:
        self.address = address
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with _without_environment(*_MISLEADING):
            self._client = self._ask(lambda: _Client(timeout_s, address, headers=headers))

    def submit(
        self,
        submission_id: str,
        entrypoint: str,
        *,
        working_dir: Path,
        wheel: Path,
        environment: dict[str, str],
    ) -> None:
        """Starts `entrypoint` as the job `submission_id`; one that is there already is left as it is.

        Args:
          submission_id: names the job for ever.
          entrypoint: a shell command, run in a copy of `working_dir` on the head.
          working_dir: a small folder.
          wheel: of our code.
          environment: variables of the driver and its workers; never secrets, Ray shows them.

        Raises:
          Refused: the cluster will not take it.
          ClusterUnreachable: nobody answers; the job may have been taken all the same.
        """
        runtime_env = {"py_modules": [str(wheel)], "working_dir": str(working_dir), "env_vars": environment}
        if self.status(submission_id) is not None:
            return
        try:
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env
                )
            )
        except RayJobsError:
            if self.status(submission_id) is None:  # another request for the same id may have been faster
                raise

    def status(self, submission_id: str) -> RayJob | None:
        """Returns what Ray says about a job; None when the cluster has none of this id."""
        try:
            details: Any = self._ask(lambda: self._client.get_job_info(submission_id))
        except Refused as refused:
            if refused.status_code == _NOT_FOUND:
                return None
            raise
        return RayJob(
            status=details.status.value,
            exit_code=details.driver_exit_code,
            message=details.message or "",
            error_type=details.error_type or "",
        )

    def alive(self) -> dict[str, RayStatus]:
        """Returns what Ray says of each submission that has not ended, by id, whoever submitted it."""
        listed: list[Any] = self._ask(self._client.list_jobs)
        known = {each.submission_id: each.status for each in listed if each.submission_id}  # others: not from a client
        return {submission_id: status.value for submission_id, status in known.items() if not status.is_terminal()}

    def stop(self, submission_id: str) -> None:
        """Asks a job to stop: SIGTERM to its driver, SIGKILL 3 s later; one that is gone or has ended is left."""
        try:
            self._ask(lambda: self._client.stop_job(submission_id))
        except Refused as refused:
            if refused.status_code != _NOT_FOUND:
                raise

    def logs(self, submission_id: str) -> str:
        """Returns all that the driver has printed so far; "" when the cluster has no such job."""
        try:
            return self._ask(lambda: self._client.get_job_logs(submission_id))
        except Refused as refused:
            if refused.status_code == _NOT_FOUND:
                return ""
            raise

    def follow(self, submission_id: str) -> Iterator[str]:
        """Yields what the driver prints, from the beginning until the job has ended."""
        loop, lines = asyncio.new_event_loop(), self._client.tail_job_logs(submission_id)
        try:
            while True:
                try:
                    yield self._ask(lambda: loop.run_until_complete(anext(lines)))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(lines.aclose())
            loop.close()

    def _ask(self, request: Callable[[], T]) -> T:
        """Returns the answer to one request, with every way to fail as one of ours."""
        try:
            return request()
        except AuthenticationError as error:
            message = (
                f"{self.address}: the cluster refuses our token; set RAY_AUTH_TOKEN to the one it was started with"
            )
            raise ClusterUnreachable(message) from error
        except (OSError, aiohttp.ClientError) as error:  # all of requests' errors are OSErrors
            message = f"{self.address}: no answer from the cluster ({type(error).__name__})"
            raise ClusterUnreachable(message) from error
        except RuntimeError as error:
            raise Refused(f"{self.address}: {_last_line(str(error))}", _status_code(str(error))) from error


class _Client(JobSubmissionClient):
    """Ray's client waits for ever for a head that accepts connections and says nothing; this one does not."""

    def __init__(self, timeout_s: float, address: str, **options: Any) -> None:
        self._timeout_s = timeout_s
        super().__init__(address, **options)

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(CONNECT_TIMEOUT_S, self._timeout_s), **arguments)


@contextlib.contextmanager
def _without_environment(*names: str) -> Generator[None]:
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _status_code(text: str) -> int:
    found = re.search(r"status code (\d+)", text)
    return int(found[1]) if found else 0


def _last_line(text: str) -> str:
    """Ray answers with a whole traceback: keep the status code and the last words."""
    lines = [line.strip() for line in text.replace("\\n", "\n").strip().splitlines() if line.strip(" .\n")]
    if not lines:
        return "no reason given"
    return lines[0] if len(lines) == 1 else f"{lines[0][:60]} ... {lines[-1]}"
