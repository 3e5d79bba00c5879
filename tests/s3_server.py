"""An S3 server for tests, of moto."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import fsspec
import pytest

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

URL = "s3://shards/here"


class Server:
    """An S3 server with an empty bucket, and what it was asked for."""

    def __init__(self, moto: ThreadedMotoServer):
        host, port = moto.get_host_and_port()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.requests: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        method, _, path = str(record.args[0]).partition(" ") if record.args else ("", "", "")
        self.requests.append((method.rpartition("m")[2], path.partition(" ")[0].partition("?")[0]))

    def count(self, method: str) -> Counter[str]:
        """Object -> how often it was asked for so."""
        return Counter(path.removeprefix("/shards/here/") for name, path in self.requests if name == method)


@pytest.fixture(scope="session")
def moto() -> Iterator[ThreadedMotoServer]:
    """One for all tests: fsspec keeps what it has opened, with the address."""
    from moto.server import ThreadedMotoServer  # slow to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(moto: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(moto)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    if store.exists("shards"):
        store.rm("shards", recursive=True)
    store.mkdir("shards")
    log, handler = logging.getLogger("werkzeug"), logging.Handler()
    handler.emit = found.emit  # type: ignore[method-assign]
    level, log.level = log.level, logging.INFO
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)
    log.level = level
