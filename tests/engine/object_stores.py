"""Object stores that run here: a real S3 server on loopback, fsspec's memory, and a folder by its URL."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BUCKET = "runs"
KEYS = {
    "AWS_ACCESS_KEY_ID": "robustscale-test",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anybody",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """Its address; it holds an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        make_bucket(f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(address: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=10).close()


def s3_url(address: str, path: str) -> str:
    return f"s3://{BUCKET}/{path}?endpoint_override={address.removeprefix('http://')}&scheme=http"


@contextmanager
def mirrored_in(folder: Path) -> Iterator[None]:
    """As on a machine whose working copies lie there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTSCALE_MIRRORS", str(folder))
        yield
