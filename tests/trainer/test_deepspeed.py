"""DeepSpeed's ZeRO on two real ranks: every case of zero_ranks.py, run once, read here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = [(stage, precision, "none") for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
CASES += [(2, "fp16", "none"), (3, "bf16", "cpu"), (2, "bf16", "cpu"), (2, "fp16", "cpu")]
WORLD_SIZE = 2


@pytest.fixture(scope="session")
def ranks(
    dataset_uri: str, tiny_model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """What the two ranks found, and the folder they worked in, which is their home folder as well."""
    folder = tmp_path_factory.mktemp("ranks")
    values = {
        "run": "ranks",
        "recipe": "glide_base",
        "dataset": dataset_uri,
        "images": 64,
        "batch": 4,
        "micro_batch": 1,
        "lr": 1e-3,
        "ema": 0.9,
        "caption_dropout": 0.25,
        "dropout": 0.1,
        "model": tiny_model,
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    environment.pop("TORCH_EXTENSIONS_DIR", None)
    script = Path(__file__).with_name("zero_ranks.py")
    processes = []
    for rank in range(WORLD_SIZE):
        command = [
            sys.executable,
            str(script),
            str(rank),
            str(WORLD_SIZE),
            str(folder),
            dataset_uri,
            json.dumps(values),
            json.dumps(CASES),
        ]
        log = (folder / f"rank-{rank}.log").open("wb")
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    codes = [process.wait(600) for process in processes]
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(WORLD_SIZE))
    assert codes == [0] * WORLD_SIZE, logs
    return json.loads((folder / "results.json").read_text()), folder


@pytest.fixture(params=CASES, ids=lambda case: "zero{}-{}-offload_{}".format(*case))
def case(request: pytest.FixtureRequest, ranks: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    return dict(ranks[0]["stage {} {} {}".format(*request.param)])


def test_masters_begin_as_the_fp32_source_and_cover_every_element_once(case: dict[str, Any]) -> None:
    assert case["step-0 masters and ema equal the fp32 source"]
    covered, expected = case["elements covered"]
    assert covered == expected
    assert case["the layout is what plans are tested with"]


def test_a_bad_gradient_under_a_normal_loss_changes_nothing_and_the_next_update_is_applied(
    case: dict[str, Any],
) -> None:
    assert case["updates"] == [4, 4]
    assert any(reason in case["spike: refused because"] for reason in ("times its median", "overflow fp16"))
    for what in ("nan", "spike"):
        assert 0 < case[f"{what}: loss"] < 3
        assert case[f"{what}: nothing changed"], what
    assert case["the next update is applied"]
    refused, applied = case["norm when refused and when applied"]
    assert refused == pytest.approx(applied, rel=1e-6), "nothing of a refused gradient is left"
    assert case["loss scale"] in (None, 1.0), "the guard's refusals do not move it"


def test_a_resume_is_exact_to_the_bit(case: dict[str, Any]) -> None:
    assert case["restored equals saved"]
    assert case["resumed goes on as if never stopped"]
    assert case["whole ema weights"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_with_recomputed_blocks_equal_those_of_the_replicated_engine_for_20_updates(
    ranks: tuple[dict[str, Any], Path], stage: int
) -> None:
    found = ranks[0][f"losses {stage}"]
    first, last = found["first and last"]
    assert last < 0.9 * first, "it learns"
    assert found["largest relative difference of 20 losses"] < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sharded_generator_and_a_replicated_critic_with_a_gradient_penalty_equal_plain_torch(
    ranks: tuple[dict[str, Any], Path], stage: int
) -> None:
    found = ranks[0][f"two parts {stage}"]
    assert found["engines"] == ["ReplicatedEngine", "DeepSpeedEngine"]
    assert found["parts that moved, by update"] == [["critic"], ["critic", "generator"]] * 3
    assert found["largest relative difference to plain torch"] < 1e-5
    assert found["resumed goes on as if never stopped"]
    assert {"critic/loss/total", "critic/loss/penalty", "critic/grad_norm", "lr"} <= set(found["figures"])


def test_no_extension_is_compiled_on_a_cpu(ranks: tuple[dict[str, Any], Path]) -> None:
    assert not [path for path in ranks[1].rglob("*") if "extension" in path.name or path.suffix in (".so", ".ninja")]
