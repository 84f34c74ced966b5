"""A real S3-compatible server for the tests: moto's, on loopback, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3

from support.servers import free_port, wait_until

BUCKET = "spilled"

# What whoever talks to the server needs in its environment.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class ObjectStoreServer:
    """A server with the bucket `BUCKET`."""

    port: int
    client: Any

    def uri(self, path: str = f"{BUCKET}/over%20flow") -> str:
        return s3_uri(path, self.port)

    def objects(self) -> dict[str, int]:
        """The lengths of what is in the bucket, without what stands for an empty directory."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        found = {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", [])}
        return {key: size for key, size in found.items() if not key.endswith("/")}

    def directories(self) -> set[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {o["Key"] for o in found if o["Key"].endswith("/")}

    def uploads(self) -> list[str]:
        """What is being uploaded, or was when its writer was killed."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET)
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def empty(self) -> None:
        """Drop everything, and make the bucket again."""
        _request(self.port, "/moto-api/reset", "POST")
        self.client.create_bucket(Bucket=BUCKET)

    @contextlib.contextmanager
    def checking_credentials(self) -> Iterator[None]:
        """Refuse whoever is not known, which is everybody."""
        _request(self.port, "/moto-api/reset-auth", "POST", b"0")
        try:
            yield
        finally:
            _request(self.port, "/moto-api/reset-auth", "POST", b"inf")


def s3_uri(path: str, port: int) -> str:
    return f"s3://{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@contextlib.contextmanager
def s3_server() -> Iterator[ObjectStoreServer]:
    """An S3-compatible server on a port of its own. `CREDENTIALS` must be in the environment."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **CREDENTIALS},
    )
    try:
        wait_until(lambda: _answers(port))
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        )
        server = ObjectStoreServer(port, client)
        server.empty()
        yield server
        client.close()
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        _request(port, "/moto-api/", "GET")
        return True
    return False


def _request(port: int, path: str, method: str, body: bytes | None = None) -> None:
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method=method)
    urllib.request.urlopen(request, timeout=10).close()
