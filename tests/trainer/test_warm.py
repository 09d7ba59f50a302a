"""A worker that waits for its rank has done what needs none: nothing of that lies between a death and the next step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

Values = Callable[..., dict[str, Any]]

CODE = """
import json, sys
from trainer.run import prepare_run, train, warm
from trainer.recipes import parse_train_config
from trainer.engine.group import open_group

values = parse_train_config(json.loads(sys.argv[1]), "test").model_dump(mode="json")
attempt = prepare_run(parse_train_config(values, "test"))
group = open_group(0, 1, "")
warm(values)
before = set(sys.modules)
train(values, attempt, group, lambda event: None)
print("LATE", json.dumps(sorted(set(sys.modules) - before)))
"""


def test_training_imports_nothing_of_weight_once_a_worker_is_warm(train_values: Values) -> None:
    values = train_values(images=16)
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(values)], capture_output=True, text=True, check=False)
    assert "LATE" in done.stdout, done.stderr
    late = json.loads(done.stdout.rpartition("LATE ")[2])
    heavy = [name for name in late if name.split(".")[0] in ("torch", "pyarrow", "sympy", "numpy", "boto3", "trainer")]
    assert len(heavy) < 20, heavy
