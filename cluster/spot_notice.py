"""`python -m cluster.spot_notice`: waits until Amazon announces that it takes this machine back, then drains the node.

Always holds: it ends after one notice; until then an answer that fails is asked for again, since only a notice means
anything. Started on spot machines by the file for Ray's cluster launcher (cluster/manifests/ray_up.py); on Kubernetes
the node's own agent deletes the pod, whose hook does the same.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from http.client import HTTPException
from typing import Any

from cluster.manifests.kuberay import drain_command

log = logging.getLogger(__name__)

METADATA = "http://169.254.169.254/latest"  # the same on every machine there
POLL_S = 5.0  # as Amazon advises
ANSWER_TIMEOUT_S = 2.0
BEFORE_S = 5  # the end, by which the node must be empty

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    notice = wait_for_notice(METADATA, POLL_S)
    seconds = seconds_left(notice, datetime.now(timezone.utc))
    log.info("the cloud says %s; draining this node, %d s left", notice, seconds)
    return subprocess.run(drain_command(seconds), shell=True, check=False).returncode


def wait_for_notice(metadata: str, poll_s: float) -> dict[str, Any]:
    """The announcement, {"action": "terminate", "time": "2026-01-31T08:22:00Z"}."""
    while True:
        try:
            return _ask(metadata)
        except urllib.error.HTTPError as error:
            if error.code != 404:  # which says: nothing is announced
                log.warning("the metadata service answers %s", error)
        except (OSError, HTTPException, ValueError) as error:
            log.warning("the metadata service: %s", error)
        time.sleep(poll_s)  # it can only be asked


def seconds_left(notice: dict[str, Any], now: datetime) -> int:
    """Whole seconds until the node must be empty, at least 0."""
    end = datetime.fromisoformat(notice["time"].replace("Z", "+00:00"))
    return max(0, int((end - now).total_seconds()) - BEFORE_S)


def _ask(metadata: str) -> dict[str, Any]:
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    request = urllib.request.Request(f"{metadata}/api/token", method="PUT", headers=lifetime)
    token = _opener.open(request, timeout=ANSWER_TIMEOUT_S).read().decode()
    request = urllib.request.Request(
        f"{metadata}/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    found: dict[str, Any] = json.load(_opener.open(request, timeout=ANSWER_TIMEOUT_S))
    return found


if __name__ == "__main__":
    sys.exit(main())
