"""A bucket whose objects may be read and written, but not listed: refused in one line before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import boto3
import moto.settings
import pytest

from cluster.cli import run
from data_pipeline.errors import UserError
from data_pipeline.storage import open_store, s3
from trainer.recipes import parse_train_config
from trainer.run import prepare_run

ALLOWED = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]


@pytest.fixture
def no_listing_uri(moto_uri: str, moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket, with the credentials of somebody who may not list it in this process's environment."""
    iam = boto3.session.Session().client("iam", endpoint_url=moto_url)
    iam.create_user(UserName="trainer")
    statement = {"Effect": "Allow", "Action": ALLOWED, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName="trainer", PolicyName="no-listing", PolicyDocument=policy)
    key = iam.create_access_key(UserName="trainer")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the mock looks at who asks
    return moto_uri


def test_a_bucket_that_may_not_be_listed_is_refused_in_one_line_at_once(
    no_listing_uri: str,
    train_values: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = open_store(no_listing_uri)
    store.put("attempts/key", [b"what may be written"])
    assert store.get("attempts/key") == b"what may be written"
    # Without the minutes of patience that a server which is away gets.
    monkeypatch.setattr(s3, "_pause", lambda *_: pytest.fail("it waited to try again"))
    config = parse_train_config({**train_values(), "store": no_listing_uri}, "test")
    with pytest.raises(UserError, match=rf"^store {no_listing_uri}: expected access, found a refusal: no permission"):
        prepare_run(config)
    for command in ("list", "verify", "sweep"):
        assert run(["checkpoints", command, no_listing_uri, "--json"]) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert "a refusal: no permission" in error and "\n" not in error
    assert store.get("attempts/key") == b"what may be written"
