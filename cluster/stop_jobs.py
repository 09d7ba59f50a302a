"""`python -m cluster.stop_jobs ADDRESS SECONDS`: ask every job of a cluster to stop, and wait until they have ended.

Always holds: it ends once no job runs or the time is over, and not when one answer fails: the head would be ended, and
its jobs without a save; a training run saves before it ends. Called by a head pod that is being deleted
(cluster/manifests/kuberay.py), before its processes get SIGTERM.
"""

from __future__ import annotations

import sys
import time

import requests
from ray.job_submission import JobSubmissionClient

POLL_S = 1.0


def stop_jobs(address: str, seconds: float) -> list[str]:
    """Ids of the jobs that still run after that long. Raises what the last answer of the Jobs API raised."""
    client = JobSubmissionClient(address)
    until = time.monotonic() + seconds
    asked: set[str] = set()
    while True:
        try:
            running = [job.submission_id for job in client.list_jobs() if not job.status.is_terminal()]
            names = sorted(name for name in running if name)  # a driver that is no job has none, and need not be asked
            for name in set(names) - asked:
                client.stop_job(name)  # refused for one that has just ended
                asked.add(name)
            if not names or time.monotonic() > until:
                return names
        except (RuntimeError, requests.RequestException) as error:
            if time.monotonic() > until:
                raise
            print(f"asking the jobs to stop: {error}; trying again", file=sys.stderr)
        time.sleep(POLL_S)  # the Jobs API tells nobody when a job ends


if __name__ == "__main__":
    left = stop_jobs(sys.argv[1], float(sys.argv[2]))
    sys.exit(f"still running: {', '.join(left)}" if left else 0)
