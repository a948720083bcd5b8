"""A real S3 API on loopback, and one empty store of each kind."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.store.samples import Place


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, Any]]:
    """The options that reach the server; its bucket is called "bucket"."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        secret = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        boto3.client("s3", region_name="us-east-1", endpoint_url=endpoint, **secret).create_bucket(Bucket="bucket")
        yield {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": endpoint}}
    finally:
        server.stop()


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "store"), tmp_path / "cache")


@pytest.fixture
def memory(tmp_path: Path) -> Place:
    return Place(f"memory://{secrets.token_hex(4)}/store", tmp_path / "cache")


@pytest.fixture
def bucket(tmp_path: Path, s3: dict[str, Any]) -> Place:
    return Place(f"s3://bucket/{secrets.token_hex(4)}/store", tmp_path / "cache", s3)


@pytest.fixture(params=["local", "memory", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    """An empty store of each kind in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Place)
    return found
