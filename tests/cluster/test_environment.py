"""The environment of a worker, without Ray and without a GPU."""

from __future__ import annotations

from cluster.environment import NodeFacts, node_environment, rank_environment, threads_of_rank


def test_each_rank_sees_all_gpus_of_its_node_and_shares_the_cpus_fairly() -> None:
    facts = NodeFacts(
        "cuda", threads_of_rank("cuda", cpus=26, ranks=4), gpu_ids=("4", "5", "MIG-7", "6"), interface="eth1"
    )
    assert node_environment(facts, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}) == {
        "CUDA_VISIBLE_DEVICES": "4,5,MIG-7,6",
        "OMP_NUM_THREADS": "6",
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_SOCKET_IFNAME": "eth1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "DS_ACCELERATOR": "cuda",
    }
    threads = {cpus: threads_of_rank("cuda", cpus, ranks=4) for cpus in (1, 4, 64, 1000)}
    assert threads == {1: 1, 4: 1, 64: 16, 1000: 16}
    assert rank_environment(13, 16, 5) == {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}


def test_on_cpu_a_rank_has_one_thread_and_what_gpus_need_is_left_alone() -> None:
    assert node_environment(
        NodeFacts("cpu", threads_of_rank("cpu", 64, 2), interface="lo"), {"OMP_NUM_THREADS": "64"}
    ) == {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    assert "GLOO_SOCKET_IFNAME" not in node_environment(NodeFacts("cpu"), {})


def test_what_the_user_set_for_a_library_wins_but_not_what_ray_set() -> None:
    users = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "eth7",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "99",
        "CUDA_VISIBLE_DEVICES": "",
    }
    made = node_environment(NodeFacts("cuda", 8, ("2",), "eth0"), users)
    assert made == {"CUDA_VISIBLE_DEVICES": "2", "OMP_NUM_THREADS": "8", "DS_ACCELERATOR": "cuda"}
