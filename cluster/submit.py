"""`glidepath submit`: a corpus build, training run or evaluation as a Ray Job, checked here before it starts there.

Always holds: a job's id is taken once for ever (Ray refuses used ones), so two submits at one instant cannot both
start; a job runs the code of this checkout as it was at that moment, on every node and after every restart; waiting or
not changes nothing for the job. Called by the command line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from cluster.console import say
from cluster.job import RESULT
from cluster.package import Tree, checkout, working_tree, write_zip
from cluster.work import Node, Work, job_environment, refuse_unfit
from data_pipeline.config import state_folder
from data_pipeline.errors import UsageError, UserError
from data_pipeline.shards import open_dataset
from data_pipeline.storage import open_store
from trainer.checkpoint.attempts import newest_attempt
from trainer.tracking.mlflow import check_server
from trainer.tracking.server import is_server

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ANSWER_TIMEOUT_S = 10
STATUS_POLL_S = 1.0
PATIENCE_S = 60  # without an answer about a job, which goes on meanwhile: a dashboard takes less to start again
MAX_NODES = 10_000  # that Ray's state API lists
# Lines of a job's log that are not shown: two carry a whole configuration or summary, an error is said once at the end.
NOT_FOR_PEOPLE = (RESULT, "Running entrypoint for job ", "error: ")

Answer = TypeVar("Answer")


def address_of(option: str | None) -> str:
    """The cluster's address: the option, or that of the environment. Raises UsageError."""
    named = [os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name, "").startswith("http")]
    address = option or (named[0] if named else "")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        found = "none" if not address else "credentials in it" if "@" in parts.netloc else address
        raise UsageError(
            "--address", "http(s)://HOST:PORT of a Ray dashboard", found, f"give it, or set {ADDRESS_VARIABLES[0]}"
        )
    return f"{parts.scheme}://{parts.netloc}"


class Cluster:
    """A Ray cluster by the address of its dashboard, with the Jobs API."""

    def __init__(self, address: str) -> None:
        """Raises UserError, within seconds, if no cluster answers there."""
        self.address = address
        self.nodes = self._live_nodes()
        self.client = self._connect()

    def submit(self, work: Work) -> str:
        """Start the job; its submission id. Raises UserError if it cannot run there, or runs already."""
        refuse_unfit(self.nodes, work)
        entrypoint = work.entrypoint(os.environ)
        root = checkout()
        tree = working_tree(root, [folder for folder in work.folders if os.path.isabs(folder)]) if root else None
        attempts = _check_store(work.store) if work.kind == "train" else _check_output(work.store)
        _check_datasets(work)
        _check_tracking(work)
        with self._asking("nothing was started; look at the dashboard"):
            jobs = self.client.list_jobs()
        refuse_running(jobs, work)
        submission_id = f"{work.name}-{next_number(jobs, work.name, attempts)}"
        environment = job_environment()
        if len(self.nodes) == 1:
            environment["GLIDEPATH_HOME"] = str(state_folder().absolute())  # names of datasets mean the same there
        try:
            with tempfile.TemporaryDirectory(prefix="glidepath-") as folder:
                self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"env_vars": environment, **_packaged(tree, Path(folder))},
                    metadata=work.metadata(),
                )
        except (RuntimeError, requests.RequestException) as error:
            raise _refused(submission_id, error) from None
        return submission_id

    def follow(self, submission_id: str) -> dict[str, Any]:
        """Show the job's log until it ends; its summary. Raises UserError as the job did, or when the cluster does not
        answer for PATIENCE_S."""
        try:
            asyncio.run(self._show_log(submission_id))
        except (RuntimeError, ClientError) as error:
            say(f"the log of {submission_id} is cut off here ({error}); waiting for the job's end")
        while not (info := self._patiently(self.client.get_job_info, submission_id)).status.is_terminal():
            time.sleep(STATUS_POLL_S)  # the Jobs API tells nobody when a job ends
        return result_of(submission_id, str(info.status), self._patiently(self.client.get_job_logs, submission_id))

    def _patiently(self, question: Callable[[str], Answer], submission_id: str) -> Answer:
        """The answer about a job, which goes on whoever answers. Raises UserError after PATIENCE_S without one."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._asking(f"the job may go on: ray job status {submission_id} --address {self.address}"):
                    return question(submission_id)
            except UserError:
                if time.monotonic() > until:
                    raise
            time.sleep(STATUS_POLL_S)  # the dashboard may be starting again

    @contextmanager
    def _asking(self, next_step: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, requests.RequestException, AuthenticationError) as error:
            raise UserError(
                f"Ray cluster {self.address}", "an answer of its Jobs API", _short(error), next_step
            ) from None

    async def _show_log(self, submission_id: str) -> None:
        async for chunk in self.client.tail_job_logs(submission_id):
            for line in chunk.splitlines():
                if not line.startswith(NOT_FOR_PEOPLE):
                    say(line)

    def _live_nodes(self) -> list[Node]:
        try:
            found = list_nodes(
                address=self.address,
                filters=[("state", "=", "ALIVE")],  # an old cluster remembers many that are gone
                limit=MAX_NODES,
                timeout=ANSWER_TIMEOUT_S,
                raise_on_missing_output=False,
            )
        except AuthenticationError:
            raise UserError(
                f"Ray cluster {self.address}",
                "access",
                "a refusal without the right token",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN in this environment",
            ) from None
        except (RayStateApiException, requests.RequestException, ValueError) as error:
            reason = "no answer" if isinstance(error, RayStateApiException) else type(error).__name__
            raise UserError(
                f"Ray cluster {self.address}",
                "a dashboard with the Jobs API",
                reason,
                "check --address, or start a stack here with `glidepath up`",
            ) from None
        totals = [node.resources_total or {} for node in found]
        return [Node(int(total.get("CPU", 0)), int(total.get("GPU", 0))) for total in totals]

    def _connect(self) -> JobSubmissionClient:
        for name in ("job.sdk", "dashboard_sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        try:
            return JobSubmissionClient(self.address)
        except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
            raise UserError(f"Ray cluster {self.address}", "its Jobs API", _short(error), "check --address") from None


def refuse_running(jobs: Sequence[JobDetails], work: Work) -> None:
    """Raise UserError if a job that is not over writes to the same store."""
    for job in jobs:
        about = job.metadata or {}
        if not job.status.is_terminal() and about.get("glidepath_store") == work.store:
            raise UserError(
                f"{about['glidepath_run']} in {work.store}",
                "no job of it under way",
                f"job {job.submission_id}, {job.status}",
                f"wait for it, or end it: ray job stop {job.submission_id}",
            )


def next_number(jobs: Sequence[JobDetails], name: str, attempts: int) -> int:
    """One more than the attempts of the run and than the numbers of its earlier jobs, which Ray never takes again."""
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    matches = (pattern.fullmatch(job.submission_id or "") for job in jobs)
    return 1 + max([attempts, *(int(match[1]) for match in matches if match)])


def result_of(submission_id: str, status: str, logs: str) -> dict[str, Any]:
    """The summary that a job ended with. Raises UserError as it did, or when it ended without one."""
    lines = logs.splitlines()
    found = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    result: dict[str, Any] = json.loads(found[-1]) if found else {}
    if "fields" in result:
        raise (UsageError if result.get("usage") else UserError)(*result["fields"])
    if not result or "error" in result:
        last = result.get("error") or next((line for line in reversed(lines) if line.strip()), "an empty log")
        raise UserError(
            f"job {submission_id}", "a result", f"{status}: {last}", f"see its log: ray job logs {submission_id}"
        )
    return {**result, "submission_id": submission_id}


def _refused(submission_id: str, error: Exception) -> UserError:
    if "already exists" in str(error):
        return UserError(
            f"job {submission_id}", "an id that is free", "one that another submit has just taken", "wait for that job"
        )
    return UserError(f"job {submission_id}", "to be taken by the cluster", _short(error), "see the dashboard's log")


def _short(error: Exception) -> str:
    """One line of what may be a traceback from the other side, or a whole chain of connection errors."""
    if isinstance(error, requests.RequestException):
        return type(error).__name__
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip(" .")), type(error).__name__)


def _check_store(uri: str) -> int:
    """The run's attempts so far. Raises UserError if the store cannot be used."""
    if not _may_look(uri):
        return 0
    store = open_store(uri)
    store.check()
    return newest_attempt(store)


def _check_output(uri: str) -> int:
    if _may_look(uri):
        open_store(uri).check()
    return 0


def _may_look(uri: str) -> bool:
    """Whether this machine can ask the store: a submitter may have no credentials, then the job asks."""
    if not uri.startswith("s3://"):
        return True
    from data_pipeline.storage.s3 import credentials_found

    if not credentials_found():
        say(f"no AWS credentials here: the job will check {uri}")
        return False
    return True


def _check_datasets(work: Work) -> None:
    """Raises UserError if one of a bucket does not open; the job alone knows what lies in the folders of its node."""
    for uri in work.datasets:
        if uri.startswith("s3://") and _may_look(uri):
            open_dataset(uri)


def _packaged(tree: Tree | None, folder: Path) -> dict[str, str]:
    """The part of a runtime environment that brings the working tree, zipped in `folder`."""
    if tree is None:
        return {}
    write_zip(tree, folder / "tree.zip", os.environ)
    say(f"packaged {len(tree.sizes):,} files of {tree.root}, {(folder / 'tree.zip').stat().st_size / 2**20:.1f} MiB")
    return {"working_dir": str(folder / "tree.zip")}


def _check_tracking(work: Work) -> None:
    uri = work.values.get("tracking", {}).get("uri")
    if uri and is_server(uri):
        check_server(uri)
