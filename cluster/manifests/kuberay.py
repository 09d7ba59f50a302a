"""A described cluster as KubeRay's RayCluster, and a training run on a cluster of its own as its RayJob.

Always holds: a pod that is deleted is drained first and has its grace to save in; credentials come from a service
account or a secret, by name; probes are patient, since a loaded node answers late and must not be killed for that.
Fields: KubeRay's ray.io/v1 schemas. Called by the command `manifests`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.manifests.description import ClusterDescription, NodeKind, WorkerGroup
from cluster.work import Work, job_environment

STATE = "/glidepath"  # the state folder in a pod, on the node's disk
DASHBOARD_PORT, AGENT_PORT = 8265, 52365
PROBE = {"periodSeconds": 10, "timeoutSeconds": 10}
KEPT_AFTER_S = 600  # a cluster whose job ended, for those who want its logs
LONGEST_NAME = 47  # of a RayJob; KubeRay adds to it

Document = dict[str, Any]


def ray_cluster(cluster: ClusterDescription) -> Document:
    """The RayCluster that stays, for `glidepath submit`."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": cluster.name, "namespace": cluster.kubernetes.namespace},
        "spec": _spec(cluster),
    }


def ray_job(cluster: ClusterDescription, work: Work, environment: Mapping[str, str]) -> Document:
    """A RayJob: a cluster for this one piece of work, made again when it is lost, and gone when the work is done.

    Over HTTP, so that no shell of a submitter's pod reads the configuration in the entrypoint. Raises UserError if a
    credential of `environment` stands in it.
    """
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(cluster.graces.save_s)}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": kubernetes_name(work.name), "namespace": cluster.kubernetes.namespace},
        "spec": {
            "entrypoint": work.entrypoint(environment),
            "submissionMode": "HTTPMode",
            "metadata": work.metadata(),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": job_environment() | stop}),
            "backoffLimit": cluster.kubernetes.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_AFTER_S,
            "rayClusterSpec": _spec(cluster),
        },
    }


def kubernetes_name(name: str) -> str:
    """A run's name as Kubernetes takes names: lower case, digits and dashes, not too long."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"run-{plain}")[:LONGEST_NAME].strip("-")


def _spec(cluster: ClusterDescription) -> Document:
    kind = cluster.node_kinds[cluster.head]
    # A head that does no work cannot be taken down by it; the run's driver needs no CPU of its own.
    counted = {"num-cpus": "0", "num-gpus": "0"} if cluster.workers else {}
    scaled = any(group.min < group.max for group in cluster.workers.values())
    document: Document = {
        "rayVersion": cluster.ray_version,
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", **counted, **_start(kind)},
            **_labels(kind),
            "template": {"spec": _pod(cluster, kind, None)},
        },
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": group.min,
                "minReplicas": group.min,
                "maxReplicas": group.max,
                "rayStartParams": _start(cluster.node_kinds[group.kind]),
                **_labels(cluster.node_kinds[group.kind]),
                "template": {"spec": _pod(cluster, cluster.node_kinds[group.kind], group)},
            }
            for name, group in cluster.workers.items()
        ],
        "authOptions": {"mode": cluster.kubernetes.authentication},
    }
    if scaled:
        document |= {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}}
    return document


def _start(kind: NodeKind) -> dict[str, str]:
    return {"object-store-memory": str(kind.object_store_gib * 2**30)}


def _labels(kind: NodeKind) -> Document:
    return {"labels": {"ray.io/accelerator-type": kind.accelerator}} if kind.accelerator else {}


def _pod(cluster: ClusterDescription, kind: NodeKind, group: WorkerGroup | None) -> Document:
    """`group`: None for the head."""
    graces, spot = cluster.graces, group is not None and group.spot
    labels = cluster.kubernetes.spot_labels if spot else {}
    tolerated = [*labels, *([cluster.kubernetes.gpu_resource] if kind.gpus else [])]
    selector = {**kind.node_selector, **labels}
    account = {"serviceAccountName": cluster.service_account} if cluster.service_account else {}
    return {
        **account,
        "restartPolicy": "Never",  # a node that ended is replaced by a fresh pod
        # For a spot node as well: what it has less is the cloud's to say, and Ray is told (the deadline of the drain).
        "terminationGracePeriodSeconds": graces.save_s + graces.margin_s,
        **({"nodeSelector": selector} if selector else {}),
        **({"tolerations": [{"key": key, "operator": "Exists"} for key in tolerated]} if tolerated else {}),
        "containers": [_container(cluster, kind, group)],
        "volumes": [
            # Kubernetes gives /dev/shm 64 MiB, on which both Ray's object store and NCCL fail.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{kind.object_store_gib + kind.shm_gib}Gi"}},
            {"name": "state", "emptyDir": {"sizeLimit": f"{kind.disk_gib}Gi"}},
        ],
    }


def _container(cluster: ClusterDescription, kind: NodeKind, group: WorkerGroup | None) -> Document:
    resources: dict[str, Any] = {"cpu": kind.cpus, "memory": f"{kind.memory_gib}Gi"}
    if kind.gpus:
        resources[cluster.kubernetes.gpu_resource] = kind.gpus
    environment = {
        **cluster.environment(),
        "GLIDEPATH_HOME": STATE,
        "GLIDEPATH_CACHE_BYTES": str(cluster.cache_bytes(kind)),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    secret = cluster.credentials_secret
    ports = {"gcs-server": 6379, "dashboard": DASHBOARD_PORT, "client": 10001} if group is None else {}
    health = ("/api/gcs_healthz", DASHBOARD_PORT) if group is None else ("/api/local_raylet_healthz", AGENT_PORT)
    probe = {"httpGet": {"path": health[0], "port": health[1]}, **PROBE}
    return {
        "name": "ray-head" if group is None else "ray-worker",
        "image": cluster.image,
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        **({"envFrom": [{"secretRef": {"name": secret}}]} if secret else {}),
        **({"ports": [{"name": name, "containerPort": port} for name, port in ports.items()]} if ports else {}),
        "resources": {"requests": resources, "limits": resources},
        "startupProbe": {**probe, "failureThreshold": 30},
        "readinessProbe": {**probe, "failureThreshold": 3},
        "livenessProbe": {**probe, "failureThreshold": 12},
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", _leave(cluster, group)]}}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "state", "mountPath": STATE}],
    }


def _leave(cluster: ClusterDescription, group: WorkerGroup | None) -> str:
    """The command that runs before a pod gets SIGTERM. A worker node leaves the cluster, and its raylet ends by itself
    once nothing runs there any more; a head cannot leave, so its jobs are asked to save and end."""
    if group is None:
        return f"python -m cluster.stop_jobs http://127.0.0.1:{DASHBOARD_PORT} {cluster.graces.save_s}"
    return f"{drain_command(cluster.graces.node_s(group.spot))} && while pgrep -x raylet; do sleep 1; done"


def drain_command(seconds: int) -> str:
    """Ray's command by which the node it runs on leaves, and says how long it still has."""
    return (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the node is being taken away' "
        f"--deadline-remaining-seconds {seconds}"
    )
