"""A described cluster for Ray's own cluster launcher (`ray up`), on Amazon's machines without Kubernetes.

Always holds: the dashboard listens on the head's loopback only (`ray dashboard` opens a tunnel to it); machines get
their rights from an instance profile, no key is written. Fields: ray-schema.json of the installed Ray. Called by the
command `manifests`.
"""

from __future__ import annotations

from typing import Any

from cluster.manifests.description import Aws, ClusterDescription, NodeKind, WorkerGroup
from cluster.manifests.kuberay import STATE
from data_pipeline.errors import UsageError

HEAD = "head"  # name of the head's type; groups have their own


def launcher_file(cluster: ClusterDescription) -> dict[str, Any]:
    """The document for `ray up`. Raises UsageError without `aws`, or for a kind that is no instance type there."""
    if cluster.aws is None:
        raise UsageError(f"cluster {cluster.name}: key aws", "region, at least", "none", "set aws.region")
    head = cluster.node_kinds[cluster.head]
    types = {HEAD: _node_type(cluster, cluster.aws, cluster.head, None)}
    for name, group in cluster.workers.items():
        types[name] = _node_type(cluster, cluster.aws, group.kind, group)
    zones = {"availability_zone": ",".join(cluster.aws.zones)} if cluster.aws.zones else {}
    return {
        "cluster_name": cluster.name,
        "max_workers": sum(group.max for group in cluster.workers.values()),
        "provider": {"type": "aws", "region": cluster.aws.region, **zones, "cache_stopped_nodes": False},
        "auth": {"ssh_user": cluster.aws.ssh_user},
        "docker": {
            "image": cluster.image,
            "container_name": "glidepath",
            "pull_before_run": True,
            "disable_shm_size_detection": True,
            "run_options": ["--ulimit=nofile=65536:65536", f"--volume=/var/lib/glidepath:{STATE}"],
            "head_run_options": _run_options(cluster, head, spot=False),
        },
        "available_node_types": types,
        "head_node_type": HEAD,
        # All that is needed is in the image. Left out, Ray's defaults would install a Ray of another day.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            "ray stop",
            "ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1"
            " --object-store-memory=$OBJECT_STORE_BYTES --disable-usage-stats",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            "ray start --address=$RAY_HEAD_IP:6379 --object-store-memory=$OBJECT_STORE_BYTES",
            # Nobody else tells Ray that the cloud takes a machine back.
            '[ -z "$SPOT" ] || RAY_ADDRESS=$RAY_HEAD_IP:6379 setsid nohup python -m cluster.spot_notice'
            " >/tmp/spot-notice.log 2>&1 &",
        ],
    }


def _node_type(cluster: ClusterDescription, aws: Aws, kind_name: str, group: WorkerGroup | None) -> dict[str, Any]:
    kind = cluster.node_kinds[kind_name]
    if kind.instance_type is None:
        raise UsageError(
            f"cluster {cluster.name}: key node_kinds.{kind_name}.instance_type",
            "a type of machine of the cloud",
            "none",
            "set it, or leave out aws",
        )
    config: dict[str, Any] = {"InstanceType": kind.instance_type}
    if aws.image_id:
        config["ImageId"] = aws.image_id
    if aws.instance_profile:
        config["IamInstanceProfile"] = {"Arn": aws.instance_profile}
    if group and group.spot:
        config["InstanceMarketOptions"] = {"MarketType": "spot"}
    disk = {"VolumeSize": kind.disk_gib, "VolumeType": "gp3"}
    config["BlockDeviceMappings"] = [{"DeviceName": "/dev/sda1", "Ebs": disk}]
    if group is None:
        idle_head = {"CPU": 0, "GPU": 0}  # as in kuberay.py: work on the head could take it down
        resources = idle_head if cluster.workers else {"CPU": kind.cpus, "GPU": kind.gpus}
        return {"resources": resources, "node_config": config, "min_workers": 0, "max_workers": 0}
    return {
        "resources": {"CPU": kind.cpus, "GPU": kind.gpus},
        "node_config": config,
        "min_workers": group.min,
        "max_workers": group.max,
        "docker": {"worker_run_options": _run_options(cluster, kind, group.spot)},
    }


def _run_options(cluster: ClusterDescription, kind: NodeKind, spot: bool) -> list[str]:
    environment = {
        **cluster.environment(),
        "GLIDEPATH_HOME": STATE,
        "GLIDEPATH_CACHE_BYTES": str(cluster.cache_bytes(kind)),
        "OBJECT_STORE_BYTES": str(kind.object_store_gib * 2**30),
        **({"SPOT": "1"} if spot else {}),
    }
    shared = f"--shm-size={kind.object_store_gib + kind.shm_gib}g"
    return [shared, *(f"--env={name}={value}" for name, value in environment.items())]
