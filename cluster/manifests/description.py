"""What a cluster is made of (`configs/cluster/*.yaml`): kinds of nodes, how many of each, and how long leaving takes.

Always holds: it names secrets and accounts, and never holds one; every kind that is used is described. Read by the
modules beside it, which turn it into manifests.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cluster.work import Node
from data_pipeline.config import Settings

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
# KubeRay makes names of services and pods from it, which end at 63 characters.
ClusterName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")]
GroupName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$")]


class NodeKind(Settings):
    """One kind of machine. GiB are 2**30 bytes."""

    cpus: Positive
    gpus: NotNegative = 0
    memory_gib: Positive  # all of it, the two below included
    object_store_gib: Positive = 4  # Ray's, in shared memory: image bytes never go through it
    shm_gib: NotNegative = 8  # shared memory besides, for NCCL between the GPUs of a node
    disk_gib: Positive = 100  # of local disk, for shards that come from a bucket
    accelerator: str | None = None  # as Ray names it: H100, A100, L40S …
    instance_type: str | None = None  # of the cloud; Ray's cluster launcher needs it
    node_selector: dict[str, str] = Field(default_factory=dict)  # labels of the Kubernetes nodes that are of this kind

    @model_validator(mode="after")
    def _refuse_shared_memory_that_fills_the_node(self) -> NodeKind:
        shared = self.object_store_gib + self.shm_gib
        if shared >= self.memory_gib:
            raise ValueError(f"memory_gib above object_store_gib + shm_gib ({shared}), found {self.memory_gib}")
        return self


class WorkerGroup(Settings):
    """Nodes of one kind that come and go together."""

    kind: str
    min: NotNegative
    max: Positive  # above min: the autoscaler adds nodes for Ray tasks that wait, and removes idle ones
    spot: bool = False  # the cloud may take them back

    @model_validator(mode="after")
    def _refuse_more_than_the_most(self) -> WorkerGroup:
        if self.min > self.max:
            raise ValueError(f"min of at most max ({self.max}), found {self.min}")
        return self


class Graces(Settings):
    """How long those have that are asked to leave, in seconds."""

    save_s: Positive = 600  # for a step, a save and its commit
    margin_s: Positive = 60  # after that, before anything is killed
    spot_notice_s: Positive = 120  # the cloud's warning before it takes a spot node (AWS 120, Google and Azure 30)

    def node_s(self, spot: bool) -> int:
        """From the moment a node is asked to leave until it must be empty."""
        return min(self.save_s, max(self.spot_notice_s - 5, 1)) if spot else self.save_s


class Kubernetes(Settings):
    """What differs from one Kubernetes cluster to the next."""

    namespace: str = "default"
    gpu_resource: str = "nvidia.com/gpu"
    spot_labels: dict[str, str] = Field(default_factory=dict)  # {karpenter.sh/capacity-type: spot} …; also tolerated
    authentication: Literal["token", "disabled"] = "token"  # who reaches the dashboard may run anything on the cluster
    retries: NotNegative = 20  # clusters that a RayJob may lose, one after the other


class Aws(Settings):
    """What Ray's cluster launcher needs to know of Amazon's cloud."""

    region: str
    zones: tuple[str, ...] = ()
    image_id: str | None = None  # of the machines; null: the launcher's own choice
    instance_profile: str | None = None  # ARN of the role that reads and writes the buckets
    ssh_user: str = "ubuntu"


class ClusterDescription(Settings):
    """The keys of `configs/cluster/*.yaml`."""

    name: ClusterName
    image: str  # with the same Python, Ray and glidepath[cluster] as those who submit
    ray_version: str
    node_kinds: Annotated[dict[GroupName, NodeKind], Field(min_length=1)]
    head: str  # the kind of the head node; with worker groups it does no work itself
    workers: dict[GroupName, WorkerGroup] = Field(default_factory=dict)
    store_endpoint: str | None = None  # of the object store, where it is not Amazon's
    tracking: str | None = None  # address of the MLflow server
    service_account: str | None = None  # Kubernetes: whose pods may use the buckets
    credentials_secret: str | None = None  # Kubernetes: name of a secret whose keys become environment variables
    graces: Graces = Graces()
    kubernetes: Kubernetes = Kubernetes()
    aws: Aws | None = None

    @field_validator("store_endpoint", "tracking")
    @classmethod
    def _refuse_credentials(cls, address: str | None) -> str | None:
        if address is None:
            return address
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("http(s)://HOST[:PORT] without user, password or query, found another address")
        return address

    @model_validator(mode="after")
    def _refuse_unknown_kinds(self) -> ClusterDescription:
        used = {"head": self.head, **{f"workers.{name}.kind": group.kind for name, group in self.workers.items()}}
        for place, kind in used.items():
            if kind not in self.node_kinds:
                near = difflib.get_close_matches(kind, list(self.node_kinds), n=1, cutoff=0.0)[0]
                known = ", ".join(sorted(self.node_kinds))
                raise ValueError(f"{place} to be one of node_kinds ({known}), found {kind}; did you mean {near}?")
        return self

    def nodes(self) -> list[Node]:
        """Those that work can run on, when all are there."""
        kinds = [(self.node_kinds[group.kind], group.max) for group in self.workers.values()]
        return [
            Node(kind.cpus, kind.gpus)
            for kind, count in kinds or [(self.node_kinds[self.head], 1)]
            for _ in range(count)
        ]

    def environment(self) -> dict[str, str]:
        """What all its nodes have in their environment: addresses, nothing secret."""
        found = {"AWS_ENDPOINT_URL": self.store_endpoint, "MLFLOW_TRACKING_URI": self.tracking}
        return {name: value for name, value in found.items() if value}

    def cache_bytes(self, kind: NodeKind) -> int:
        """Of shards on the local disk: files in use stay beside it, about half as much again."""
        return kind.disk_gib * 2**30 // 2
