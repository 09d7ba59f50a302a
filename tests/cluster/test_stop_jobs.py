"""Jobs of a head that is taken away are asked to stop; with a Jobs API that fails now and then. No cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import requests

from cluster import stop_jobs


class JobsApi:
    """Its first answers fail; job b ends before it can be asked, job a once it was."""

    def __init__(self, address: str) -> None:
        self.lists, self.asked = 0, [""]

    def list_jobs(self) -> list[SimpleNamespace]:
        self.lists += 1
        if self.lists == 1:
            raise requests.ConnectionError("the dashboard is loaded")
        over = {"a": "a" in self.asked, "b": self.lists > 2}
        status = {name: SimpleNamespace(is_terminal=lambda ended=ended: ended) for name, ended in over.items()}
        return [SimpleNamespace(submission_id=name, status=status[name]) for name in ("b", "a")]

    def stop_job(self, name: str) -> None:
        if name == "b":
            raise RuntimeError("it does not run")
        self.asked.append(name)


def test_a_failed_answer_of_the_jobs_api_keeps_no_job_from_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_jobs, "JobSubmissionClient", JobsApi)
    monkeypatch.setattr(stop_jobs, "POLL_S", 0.0)
    assert stop_jobs.stop_jobs("http://127.0.0.1:8265", 60) == []
