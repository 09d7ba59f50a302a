"""What an answer of the S3 client or an exception means, the latter in words for users. Pure; called by s3.py alone.

Always holds: the words come from the kind of the exception and the service's error code. The exception's own text is
never passed on: it may hold a signed URL or the access key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

NO_CREDENTIALS = "set AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
REFUSED = {
    "InvalidAccessKeyId": "the access key is unknown to the server",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is not valid",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's",
}


@dataclass(frozen=True)
class Failure:
    """`status` of HTTP (0 without an answer) and `code` of the service. `transient`: it may succeed later."""

    expected: str
    found: str
    next_step: str
    status: int = 0
    code: str = ""
    transient: bool = False

    @property
    def missing_object(self) -> bool:
        return self.status == 404 and self.code not in ("NoSuchBucket", "NoSuchUpload")


CUT_IN_HEADERS = Failure("a whole answer", "one that was cut in its headers", "try again", transient=True)

# Fields that a whole answer always has.
FIELDS = {
    "get_object": ("ETag", "ContentLength", "ContentRange"),  # of a range
    "head_object": ("ETag", "ContentLength"),
    "create_multipart_upload": ("UploadId",),
    "upload_part": ("ETag",),
    "list_objects_v2": ("IsTruncated",),
    "list_multipart_uploads": ("IsTruncated",),
}


def is_whole(operation: str, response: dict[str, Any]) -> bool:
    """Whether an answer arrived with all of its headers.

    http.client takes a connection that ends in the headers for their end: a listing then reads as empty, and a length
    of 1239739 bytes may read as 12.
    """
    if any(field not in response for field in FIELDS.get(operation, ())):
        return False
    etag = response.get("ETag", "")
    if etag.startswith('"') and not (etag.endswith('"') and len(etag) > 1):
        return False
    if operation != "get_object" or response["ResponseMetadata"]["HTTPStatusCode"] != 206:
        return True
    stated = re.match(r"bytes (\d+)-(\d+)/", response["ContentRange"])
    return stated is not None and int(stated[2]) - int(stated[1]) + 1 == response["ContentLength"]


def explain(error: Any, endpoint: str) -> Failure:
    """What `error`, of botocore or urllib3, means. `endpoint`: URL of the service."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _answered(
            str(response.get("Error", {}).get("Code", "")),
            int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
        )
    kind = type(error).__name__
    where = urlsplit(endpoint).netloc.rpartition("@")[2]
    if "Credential" in kind or kind in ("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"):
        return Failure("credentials", f"none that can be used ({kind})", NO_CREDENTIALS)
    if kind == "ParamValidationError":
        return Failure("a bucket and keys that S3 allows", "others", "check the URI")
    if kind == "SSLError" and "CERTIFICATE_VERIFY_FAILED" in str(error):  # any other may be a handshake that was cut
        return Failure(f"a trusted certificate of {where}", "another", "set AWS_CA_BUNDLE, or check the endpoint")
    check = "check that it runs, AWS_ENDPOINT_URL and the network"
    return Failure(f"an answer from {where}", f"no answer from {where} ({kind})", check, transient=True)


def _answered(code: str, status: int) -> Failure:
    if code == "NoSuchBucket":
        return Failure("a bucket", "no such bucket", "create it, or correct the URI", status, code)
    if code in REFUSED or status in (401, 403):
        why = REFUSED.get(code, "no permission, or wrong credentials")
        return Failure("access", f"a refusal: {why} ({code})", "check the credentials", status, code)
    if status in (301, 307) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return Failure("the bucket's own region", f"another ({code})", "set AWS_REGION", status, code)
    if status == 501:
        found = f"a server without this request ({code})"
        return Failure("conditional writes and ranges", found, "use another server", status, code)
    transient = status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout")
    next_step = "try again, or look into the server's log"
    return Failure("an answer", f"error {status} ({code})", next_step, status, code, transient)
