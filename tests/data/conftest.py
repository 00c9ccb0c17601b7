"""Fixtures that isolate each test: a temporary cache, and no network except this machine."""

import dataclasses
import gzip
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest

from data import mnist, registry
from data.files import DataFile, sha256_of


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Make a user cache for this test; forbid downloads and unset $INFLUENCE_DATA."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda project: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))  # child processes read this variable
    monkeypatch.setenv("INFLUENCE_OFFLINE", "1")
    monkeypatch.delenv("INFLUENCE_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


@pytest.fixture
def online(monkeypatch):
    """Allow downloads. The test must use only the local server."""
    monkeypatch.delenv("INFLUENCE_OFFLINE")


@pytest.fixture
def serve():
    """Give `serve(content)`, which starts a server on this machine and returns its URL.

    `content` maps each path to bytes or to a function of the request handler.

    Any other path gets status 404. The list `serve.asked` collects the requested paths.
    """
    server = _Servers()
    yield server
    server.stop()


class _Servers:
    def __init__(self):
        self.asked, self._running = [], []

    def __call__(self, answers):
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                answer = answers.get(self.path)
                if answer is None:
                    self.send_error(404)
                elif callable(answer):
                    answer(self)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, format, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self._running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def stop(self):
        for server in self._running:
            server.shutdown()
            server.server_close()


def write_idx(path, array, magic=None, trailing=b""):
    """Write a uint8 array as a gzipped idx file.

    `magic` replaces the correct magic number. `trailing` is appended to the data.
    """
    magic = 0x0800 | array.ndim if magic is None else magic
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes() + trailing, compresslevel=1))


@pytest.fixture(name="write_idx")
def write_idx_fixture():
    """Give the function `write_idx(path, array, magic=None, trailing=b"")`."""
    return write_idx


@pytest.fixture(scope="session")
def made_up_mnist(tmp_path_factory):
    """Return a folder of idx files like MNIST's. Row i has pixels i % 256 and label i % 10."""
    folder = tmp_path_factory.mktemp("made_up")
    for prefix, num_rows in (("train", 60_000), ("t10k", 10_000)):
        rows = np.arange(num_rows)
        images = np.repeat((rows % 256).astype(np.uint8), 784).reshape(-1, 28, 28)
        write_idx(folder / f"mnist/{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"mnist/{prefix}-labels-idx1-ubyte.gz", (rows % 10).astype(np.uint8))
    return folder


@pytest.fixture
def accept(monkeypatch):
    """Give `accept(folder, base_url=None)`.

    After this call, the registry takes the folder's MNIST files for the real ones. With `base_url`,
    it also downloads them from there.
    """

    def register(folder: Path, base_url: str | None = None) -> tuple[DataFile, ...]:
        def expected(file):
            path = folder / file.path
            urls = () if base_url is None else (f"{base_url}/{file.path}",)
            return DataFile(file.path, path.stat().st_size, (sha256_of(path),), urls)

        dataset = dataclasses.replace(
            mnist.DATASET, files=tuple(expected(file) for file in mnist.DATASET.files)
        )
        monkeypatch.setitem(registry.SETS, "mnist", dataset)
        return dataset.files

    return register


@pytest.fixture
def root(made_up_mnist, tmp_path, accept):
    """Return a writable copy of `made_up_mnist` that the registry accepts as the real MNIST."""
    folder = tmp_path / "root"
    shutil.copytree(made_up_mnist, folder)
    accept(folder)
    return folder
