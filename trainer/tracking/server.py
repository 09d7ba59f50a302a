"""Which tracker a setting means: a folder, or a tracking server by its URL.

Always holds: a server's URL carries no credentials, since configurations are stored and shown. Called by the driver and
by the command line; the trackers get what these functions return.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from data_pipeline.errors import UsageError

ENVIRONMENT = "MLFLOW_TRACKING_URI"


def is_server(uri: str | None) -> bool:
    """Whether `tracking.uri` names an MLflow server rather than a folder."""
    return uri is not None and uri.startswith(("http://", "https://"))


def tracking_uri(setting: str | None, environment: Mapping[str, str]) -> str | None:
    """`setting`, or without one the server that the environment names.

    Raises UsageError for credentials in the URL, or a kind of URI that is neither a folder nor a server.
    """
    name, uri = ("tracking.uri", setting) if setting is not None else (ENVIRONMENT, environment.get(ENVIRONMENT))
    if not uri:
        return None
    scheme, separator, rest = uri.partition("://")
    if separator and "@" in re.split("[/?#]", rest, maxsplit=1)[0]:
        raise UsageError(
            name,
            "an address without user:password@",
            "credentials in it",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead: configurations are stored",
        )
    if (separator and scheme not in ("http", "https")) or (setting is None and not is_server(uri)):
        kinds = "http(s)://…" if setting is None else "a folder or http(s)://…"
        raise UsageError(f"{name}", kinds, f"{scheme}:…", "start a server in front of it: mlflow server, glidepath up")
    return uri
