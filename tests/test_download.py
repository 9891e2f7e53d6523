"""Files from URLs and from the user's folder, against a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from moiety.data import url as url_module
from moiety.data.download import Source, cache_dir, fetch, obtain
from moiety.errors import InputError

CONTENT = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    cut_after: int | None = None  # bytes of the next answer, once
    ranges: list[str]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        asked = self.headers.get("Range", "")
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-") or 0)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        stop, server.cut_after = server.cut_after, None
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MOIETY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(url_module, "sleep", lambda seconds: None)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.ranges = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def source(server: Server, path: str = "/corpus.h5") -> Source:
    address = f"http://127.0.0.1:{server.server_port}{path}"
    return Source("url", "corpus", "1", "corpus.h5", DIGEST, len(CONTENT), url=address)


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(server: Server):
    server.cut_after = 100_000
    archive = fetch(source(server))
    assert archive.path.read_bytes() == CONTENT
    assert server.ranges == ["", "bytes=100000-"]
    assert fetch(source(server)).sha256 == DIGEST and len(server.ranges) == 2  # cached


def test_a_killed_download_goes_on_in_the_next_process(server: Server):
    partial = cache_dir() / "artifacts" / "url" / ".partial-corpus.h5"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:250_000])
    assert fetch(source(server)).path.read_bytes() == CONTENT
    assert server.ranges == ["bytes=250000-"] and not partial.exists()


def test_a_file_without_a_known_checksum_is_never_pieced_together(server: Server):
    with pytest.raises(InputError, match="only https is fetched, and http where the recipe knows the sha256"):
        fetch(replace(source(server), sha256="unknown"))


@pytest.mark.parametrize(("change", "told"), [({"sha256": "0" * 64}, "sha256"), ({"size": 7}, "300,000 bytes")])
def test_another_file_than_expected_is_deleted(server: Server, change: dict, told: str):
    with pytest.raises(InputError, match=f"{told}.*the file was deleted"):
        fetch(replace(source(server), **change))
    assert not [path for path in cache_dir().rglob("*") if path.is_file() and not path.name.endswith(".lock")]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,hello"])
def test_redirects_to_other_schemes_are_refused(server: Server, target: str):
    with pytest.raises(InputError, match="only https is fetched"):
        fetch(source(server, f"/to/{target}"))
    with pytest.raises(InputError, match="only https is fetched"):
        fetch(replace(source(server), url=target))


def test_what_the_user_has_is_taken_checked_and_never_deleted(server: Server, tmp_path: Path):
    own = tmp_path / "corpus.h5"
    own.write_bytes(CONTENT)
    (archive,) = obtain(source(server), tmp_path)
    assert archive.path == own and server.ranges == []
    own.write_bytes(b"something else")
    with pytest.raises(InputError, match="expected"):
        obtain(source(server), tmp_path)
    assert own.exists()


def test_a_gated_source_is_never_fetched(server: Server, tmp_path: Path):
    gated = replace(source(server), gate="accept the licence at https://example.org/corpus")
    with pytest.raises(InputError, match=r"accept the licence at https://example.org/corpus.*--from DIR"):
        obtain(gated)
    assert server.ranges == []
    (tmp_path / "corpus.h5").write_bytes(CONTENT)
    assert obtain(gated, tmp_path)[0].sha256 == DIGEST
