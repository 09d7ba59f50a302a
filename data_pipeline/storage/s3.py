"""S3Store: an ObjectStore in a bucket of S3 or of a server that speaks its protocol.

Always holds: a `put` that returned was acknowledged by the server with a CRC32 of the bytes; a read returns every byte
asked for or raises, however often the connection is cut; a failure is a StoreError of one line that holds neither
credentials nor signatures. Endpoint, region and credentials come from the usual AWS places (environment, shared files)
and never from a URI, so a store travels to another process as its URI alone. Called through `open_store`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError, UserError
from data_pipeline.storage.s3_errors import CUT_IN_HEADERS, Failure, explain, is_whole
from data_pipeline.storage.store import ObjectInfo, ObjectNotFound, StoreError

log = logging.getLogger(__name__)

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
PART_BYTES = 16 * 2**20
GROW_EVERY_PARTS = 250  # a later part is larger: 40 GiB in 1,000 parts, 3.2 TiB in the 10,000 that S3 allows
UPLOAD_THREADS = 4  # parts in flight of one upload; its memory is this many parts, and one
PIECE_BYTES = 128 * 2**10  # a cut loses the piece under way, so pieces are small
PATIENCE_S = 30.0  # for one request; then a save is better given up, and the next one tried
CHECK_PATIENCE_S = 3.0  # somebody waits for the answer
READ_PATIENCE_S = 120.0  # without a new byte: training needs it, so longer than a server takes to start again
LONGEST_PAUSE_S = 5.0
CONFLICT_TRIES = 20
CHECKSUM = "CRC32"  # the strongest that botocore computes without a compiled extension


class S3Store:
    """See ObjectStore. `anonymous` sends no credentials, for public buckets. The bucket is never made."""

    def __init__(self, uri: str, anonymous: bool = False) -> None:
        """Raises UsageError for a URI that names no bucket, and where boto3 is not installed."""
        _require_boto3()
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not BUCKET.fullmatch(bucket) or "?" in prefix:
            # Not shown: what stands in a bucket's place may be key:secret@bucket.
            raise UsageError("store s3://…", "s3://bucket/prefix", "another form", "credentials do not belong in it")
        self.bucket, self.prefix, self.anonymous = bucket, f"{prefix.strip('/')}/".lstrip("/"), anonymous
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.uri, self.anonymous)

    def check(self) -> None:
        """Raises UserError, within seconds, where the bucket cannot be listed."""
        try:
            self._request("list_objects_v2", "", CHECK_PATIENCE_S, quick=True, Prefix=self.prefix, MaxKeys=1)
        except _Refused as refused:
            failure = refused.failure
            raise UserError(f"store {self.uri}", failure.expected, failure.found, failure.next_step) from None

    def put(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        parts = _parts(chunks)
        head = list(islice(parts, 2))
        if len(head) == 2:
            self._put_parts(key, chain(head, parts))
            return
        self._call("put_object", key, Body=b"".join(head), ChecksumAlgorithm=CHECKSUM)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        for attempt in range(CONFLICT_TRIES):
            try:
                self._call("put_object", key, Body=data, ChecksumAlgorithm=CHECKSUM, IfNoneMatch="*")
                return True
            except _Refused as refused:
                if refused.failure.status == 412:
                    return False
                if refused.failure.status != 409:  # 409: another conditional write of this key is under way
                    raise
            _pause(attempt)
        raise StoreError(f"{self.uri}/{key}", f"{CONFLICT_TRIES} conditional writes met another one under way")

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            self.facts(key)
        return b"".join(self.stream(key, start, length))

    def facts(self, key: str) -> tuple[str, int]:
        """The ETag, of which another one means other bytes, and the size in bytes. Raises ObjectNotFound."""
        head = self._call("head_object", key)
        return head["ETag"], head["ContentLength"]

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` (fewer than `length` only where the object ends), in pieces.

        A body that is cut goes on where it stopped (botocore repeats requests, not bodies), for as long as bytes
        arrive at least every READ_PATIENCE_S. Raises ObjectNotFound.
        """
        position, end, version, cuts = start, None if length is None else start + length, "", 0
        patient_until = time.monotonic() + READ_PATIENCE_S
        while end is None or position < end:
            response = self._open(key, position, end, version)
            if response is None:
                return
            version, end = response["ETag"], position + response["ContentLength"]
            try:
                for piece in response["Body"].iter_chunks(PIECE_BYTES):
                    position, cuts = position + len(piece), 0
                    patient_until = time.monotonic() + READ_PATIENCE_S
                    yield piece
            except _failures() as error:
                failure = explain(error, _endpoint())
                if time.monotonic() > patient_until:
                    raise _Refused(f"{self.uri}/{key}", failure) from None
                log.debug("%s/%s: %s at byte %d; reading on", self.uri, key, failure.found, position)
                _pause(cuts)
                cuts += 1

    def _open(self, key: str, position: int, end: int | None, version: str) -> Any:
        """The response whose body begins at `position`; None at or past the end of the object.

        Always asks for a range: its answer states its place twice, so that a cut in the headers shows.
        """
        asked: dict[str, Any] = {"Range": f"bytes={position}-{'' if end is None else end - 1}"}
        if version:
            asked["IfMatch"] = version
        try:
            response = self._call("get_object", key, READ_PATIENCE_S, **asked)
        except _Refused as refused:
            if refused.failure.status == 416:
                return None
            if refused.failure.status == 412:
                raise StoreError(f"{self.uri}/{key}", "replaced by another object while it was read") from None
            raise
        status = response["ResponseMetadata"]["HTTPStatusCode"]
        if status != 206 or not response["ContentRange"].startswith(f"bytes {position}-"):
            raise StoreError(f"{self.uri}/{key}", f"the server answers a request for a range with status {status}")
        return response

    def exists(self, key: str) -> bool:
        try:
            self.facts(key)
        except ObjectNotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for page in self._pages("list_objects_v2", prefix, {"ContinuationToken": "NextContinuationToken"}):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # marks that consoles put for empty folders
                    yield ObjectInfo(entry["Key"].removeprefix(self.prefix), entry["Size"])

    def delete(self, key: str) -> None:
        self._call("delete_object", key)

    def sweep_uploads(self, prefix: str = "", owned: Callable[[str], bool] = lambda key: True) -> int:
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        pages = self._pages("list_multipart_uploads", prefix, markers)
        uploads = [upload for page in pages for upload in page.get("Uploads", ())]
        swept = 0
        for upload in uploads:
            key = upload["Key"].removeprefix(self.prefix)
            if owned(key):
                self._abort(key, upload["UploadId"])
                swept += 1
        return swept

    def local_path(self, key: str) -> Path | None:
        return None

    def _put_parts(self, key: str, parts: Iterable[bytearray]) -> None:
        upload_id = self._call("create_multipart_upload", key, ChecksumAlgorithm=CHECKSUM)["UploadId"]
        try:
            done, size = self._upload_parts(key, upload_id, parts)
            self._complete(key, upload_id, done, size)
        except BaseException:
            # Whatever ended it, an interrupt too: what is stored of it would be paid for until somebody sweeps.
            try:
                self._abort(key, upload_id)
            except StoreError as error:
                log.warning("upload not aborted, a later sweep will: %s", error)
            raise

    def _upload_parts(
        self, key: str, upload_id: str, parts: Iterable[bytearray]
    ) -> tuple[Sequence[dict[str, Any]], int]:
        """What completes the upload, and its size in bytes."""

        def send(number: int, part: bytearray) -> dict[str, Any]:
            checked: dict[str, Any] = {"UploadId": upload_id, "ChecksumAlgorithm": CHECKSUM}
            stored = self._call("upload_part", key, PartNumber=number, Body=part, **checked)
            facts = {name: stored[name] for name in ("ETag", f"Checksum{CHECKSUM}") if name in stored}
            return {"PartNumber": number, **facts}

        done, size = [], 0
        pending: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="upload") as pool:
            try:
                for number, part in enumerate(parts, 1):
                    if len(pending) == UPLOAD_THREADS:
                        done.append(pending.popleft().result())
                    size += len(part)
                    pending.append(pool.submit(send, number, part))
                done += [future.result() for future in pending]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)  # a part that arrives after the abort would stay
                raise
        return done, size

    def _complete(self, key: str, upload_id: str, done: Sequence[dict[str, Any]], size: int) -> None:
        try:
            self._call("complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": done})
        except _Refused as refused:
            # A repeat of a request whose answer was lost meets its own success.
            if refused.failure.code != "NoSuchUpload" or not self._has(key, size):
                raise

    def _has(self, key: str, size: int) -> bool:
        try:
            return self.facts(key)[1] == size
        except ObjectNotFound:
            return False

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self._call("abort_multipart_upload", key, UploadId=upload_id)
        except _Refused as refused:
            if refused.failure.code != "NoSuchUpload":
                raise

    def _call(self, operation: str, key: str, patience_s: float | None = None, **arguments: Any) -> Any:
        """One request about an object, repeated for a while if it fails in a way that may pass.

        Not by botocore: its quota of repeats is spent in one outage, and then it repeats nothing when the server is
        back but still answers some requests with 503. Raises ObjectNotFound, or StoreError without the exception that
        caused it, whose text and traceback may hold a signature.
        """
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"object key {key!r}: expected a relative path inside the store")
        patience_s = PATIENCE_S if patience_s is None else patience_s
        return self._request(operation, key, patience_s, Key=self.prefix + key, **arguments)

    def _request(self, operation: str, name: str, patience_s: float, quick: bool = False, **arguments: Any) -> Any:
        attempt, patient_until = 0, time.monotonic() + patience_s
        while True:
            try:
                response = getattr(_client(self.anonymous, quick), operation)(Bucket=self.bucket, **arguments)
                if is_whole(operation, response):
                    return response
                failure = CUT_IN_HEADERS
            except _failures() as error:
                failure = explain(error, _endpoint())
            except ValueError:  # of botocore's parsers, by a header that was cut: half a date, a length without digits
                failure = CUT_IN_HEADERS
            if failure.missing_object:
                raise ObjectNotFound(f"{self.uri}/{name}")
            if not failure.transient or time.monotonic() > patient_until:
                raise _Refused(f"{self.uri}/{name}".rstrip("/"), failure)
            _pause(attempt)
            attempt += 1

    def _pages(self, operation: str, prefix: str, markers: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Every page of a listing. `markers`: request parameter -> field of the page before that goes into it."""
        onward: dict[str, Any] = {}
        while True:
            page = self._request(operation, prefix, PATIENCE_S, Prefix=self.prefix + prefix, **onward)
            yield page
            if not page.get("IsTruncated"):
                return
            onward = {parameter: page[field] for parameter, field in markers.items()}


class _Refused(StoreError):
    """A StoreError that a caller in this file may look into."""

    def __init__(self, name: str, failure: Failure) -> None:
        super().__init__(name, f"{failure.found}; {failure.next_step}")
        self.failure = failure

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreError, (self.name, self.what)


def _parts(chunks: Iterable[bytes | memoryview]) -> Iterator[bytearray]:
    """The chunks, tiny or huge, cut into upload parts."""
    part, number = bytearray(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while len(view):
            size = PART_BYTES * (1 + number // GROW_EVERY_PARTS)
            room = size - len(part)
            part += view[:room]
            view = view[room:]
            if len(part) == size:
                yield part
                part, number = bytearray(), number + 1
    if part:
        yield part


def _pause(attempt: int) -> None:
    """Back off, longer each time, not in step with other readers that met the same failure."""
    time.sleep(min(0.05 * 2**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1))


def _require_boto3() -> None:
    try:
        import boto3  # noqa: F401
    except ImportError:
        raise UsageError("store s3://…", "boto3", "no such package", "pip install 'glidepath[cluster]'") from None
    logging.getLogger("botocore").setLevel(logging.WARNING)  # below that it logs requests with their signatures


def _client(anonymous: bool, quick: bool) -> Any:
    # A forked process must not share its parent's connections; and who changes AWS_… expects it to count.
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    environment = hashlib.sha256(repr(settings).encode()).hexdigest()
    return _new_client(os.getpid(), environment, anonymous, quick)


@lru_cache(maxsize=8)
def _new_client(process: int, environment: str, anonymous: bool, quick: bool) -> Any:
    """`quick` is for a question whose answer somebody waits for."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.handlers import add_expect_header

    config = Config(
        signature_version=UNSIGNED if anonymous else "s3v4",
        connect_timeout=4 if quick else 5,
        read_timeout=8 if quick else 30,
        retries={"mode": "standard", "total_max_attempts": 1},  # see S3Store._call
        max_pool_connections=32,
        tcp_keepalive=True,
        # Every stored byte has a digest of ours, checked by who reads it, who then also knows what to do.
        response_checksum_validation="when_required",
    )
    with _refusing_bad_settings():
        client = boto3.session.Session().client("s3", config=config)
    # Else each upload waits for the server's "100 Continue", and when the link is cut within that line botocore reads
    # on for ever (AWSConnection._consume_headers), at full speed and without a timeout.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    return client


@contextmanager
def _refusing_bad_settings() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError

    try:
        yield
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise UserError(
            "AWS settings", "a profile and an endpoint that exist", type(error).__name__, "check AWS_… and ~/.aws"
        ) from None


def _endpoint() -> str:
    return str(_client(anonymous=False, quick=False).meta.endpoint_url)


def _failures() -> Any:
    """Every exception of the service or of the way to it."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return BotoCoreError, ClientError, HTTPError, ResponseParserError


def make_bucket(bucket: str, endpoint_url: str, access_key_id: str, secret_access_key: str) -> None:
    """Make a bucket on the server at `endpoint_url`, whatever the environment says; one of ours may be there already.

    Raises UserError when the server refuses or does not answer.
    """
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.session.Session(access_key_id, secret_access_key, region_name="us-east-1").client(
        "s3", endpoint_url=endpoint_url
    )
    try:
        client.create_bucket(Bucket=bucket)
    except _failures() as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        if code != "BucketAlreadyOwnedByYou":
            raise UserError(f"bucket {bucket} at {endpoint_url}", "to be made", code, "see the server's log") from None


def credentials_found() -> bool:
    """Whether the usual AWS chain of this process has any; whether they are good is `S3Store.check`'s to say."""
    _require_boto3()
    import boto3

    with _refusing_bad_settings():
        return boto3.session.Session().get_credentials() is not None
