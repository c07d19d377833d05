import contextlib
import dataclasses
import hashlib
import http.server
import multiprocessing
import re
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.models import fetch as fetch_module
from jaxcells.models.fetch import (
    IMAGENET_WEIGHTS,
    WeightsUnavailableError,
    cache_folder,
    fetch,
    fetch_imagenet,
    file_sha256,
)

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass
class Hub:
    """What the test server serves, and what it was asked.

    `drops` holds, for each coming request, after how many bytes the connection breaks off.
    """

    address: str
    content: bytes = CONTENT
    ranges: bool = True
    status: int = 200
    drops: list[int] = dataclasses.field(default_factory=list)
    announced: bool = True
    requests: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)

    @property
    def url(self):
        return f"{self.address}/timm/resnet34.tv_in1k/resolve/main/model.safetensors"

    @property
    def asked_ranges(self):
        return [asked for _, asked in self.requests]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server.hub
        asked = self.headers["Range"]
        hub.requests.append((self.path, asked))
        if hub.status != 200:
            self.send_error(hub.status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and hub.ranges else 0
        if start >= len(hub.content):
            self.send_error(416)
            return
        body = hub.content[start:]
        self.send_response(206 if start else 200)
        if start:
            last, total = len(hub.content) - 1, len(hub.content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{total}")
        if hub.announced:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: hub.drops.pop(0)] if hub.drops else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "w.safetensors"


def leftovers(path):
    return {p.name for p in path.parent.iterdir()} - {f"{path.name}.lock"}


def test_download_and_reuse_without_network(hub, path):
    assert fetch(hub.url, path, sha256=SHA256) == path
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == {path.name}
    hub.status = 500
    assert fetch(hub.url, path, sha256=SHA256) == path
    assert len(hub.requests) == 1


def test_broken_connection_is_taken_up_where_it_broke(hub, path):
    hub.drops = [100_000, 50_000]
    fetch(hub.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert hub.asked_ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_resumes(hub, path):
    hub.drops = [100_000, 0]
    with pytest.raises(WeightsUnavailableError, match="broke off after 100000 of 300000 bytes"):
        fetch(hub.url, path, sha256=SHA256)
    assert not path.exists()
    assert leftovers(path) == {"w.safetensors.partial"}
    fetch(hub.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert hub.asked_ranges[2:] == ["bytes=100000-"]
    assert leftovers(path) == {path.name}


def test_server_without_ranges_starts_again(hub, path):
    hub.ranges = False
    hub.drops = [100_000]
    fetch(hub.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert len(hub.requests) == 2


def test_server_without_ranges_that_always_breaks_is_given_up(hub, path):
    hub.ranges = False
    hub.drops = [100_000] * 9
    with pytest.raises(WeightsUnavailableError):
        fetch(hub.url, path, sha256=SHA256)
    assert len(hub.requests) == 2


def test_tampered_file_is_removed_and_both_hashes_named(hub, path):
    hub.content = CONTENT[:1000] + b"X" + CONTENT[1001:]
    with pytest.raises(Error) as caught:
        fetch(hub.url, path, sha256=SHA256)
    message = str(caught.value)
    assert not isinstance(caught.value, WeightsUnavailableError)
    assert SHA256 in message
    assert hashlib.sha256(hub.content).hexdigest() in message
    assert str(path) in message
    assert "--config.init=random" in message
    assert "\n" not in message
    assert leftovers(path) == set()
    assert len(hub.requests) == 1


@pytest.mark.parametrize("announced", [True, False])
def test_truncated_file_is_removed(hub, path, announced):
    hub.content, hub.announced = CONTENT[:-1], announced
    with pytest.raises(Error, match=f"instead of {SHA256}"):
        fetch(hub.url, path, sha256=SHA256)
    assert leftovers(path) == set()


@pytest.mark.parametrize("stale", [b"another file" * 100, CONTENT + b"more", b"x" * len(CONTENT)])
def test_partial_file_of_something_else_is_discarded_once(hub, path, stale):
    path.parent.mkdir()
    path.with_name("w.safetensors.partial").write_bytes(stale)
    fetch(hub.url, path, sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert hub.asked_ranges == [f"bytes={len(stale)}-", None]


@pytest.mark.parametrize(("drops", "num_requests"), [([], 2), ([1_000_000, 1000], 3)])
def test_stale_partial_of_a_tampered_file_ends(hub, path, drops, num_requests):
    hub.drops = drops
    path.parent.mkdir()
    path.with_name("w.safetensors.partial").write_bytes(b"another file")
    hub.content = CONTENT[:-1] + b"X"
    with pytest.raises(Error, match="instead of"):
        fetch(hub.url, path, sha256=SHA256)
    assert len(hub.requests) == num_requests
    assert leftovers(path) == set()


def test_whole_partial_file_is_taken(hub, path):
    path.parent.mkdir()
    path.with_name("w.safetensors.partial").write_bytes(CONTENT)
    fetch(hub.url, path, sha256=SHA256)
    assert leftovers(path) == {path.name}
    assert path.read_bytes() == CONTENT


def test_wrong_file_in_the_cache_is_refused_and_left(hub, path):
    path.parent.mkdir()
    path.write_bytes(b"put here by hand")
    with pytest.raises(Error) as caught:
        fetch(hub.url, path, sha256=SHA256)
    assert SHA256 in str(caught.value)
    assert hashlib.sha256(b"put here by hand").hexdigest() in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"put here by hand"
    assert hub.requests == []


def assert_says_what_to_do(error, url, path, reason):
    message = str(error)
    assert "\n" not in message
    for part in (url, str(path), SHA256, path.name, "--config.init=random", reason):
        assert part in message


def test_http_error(hub, path):
    hub.status = 404
    with pytest.raises(WeightsUnavailableError) as caught:
        fetch(hub.url, path, sha256=SHA256)
    assert_says_what_to_do(caught.value, hub.url, path, "404")
    assert len(hub.requests) == 1


def test_nobody_answers(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/w"
        with pytest.raises(WeightsUnavailableError) as caught:
            fetch(url, path, sha256=SHA256)
    assert_says_what_to_do(caught.value, url, path, "Connection refused")


def test_silence_ends_soon(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch_module._TIMEOUT_S <= 10
    monkeypatch.setattr(fetch_module, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w"
        start = time.monotonic()
        with pytest.raises(WeightsUnavailableError) as caught:
            fetch(url, path, sha256=SHA256)
        assert time.monotonic() - start < 2
    assert_says_what_to_do(caught.value, url, path, "timed out")


def test_answer_that_is_not_http(path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with contextlib.closing(server.accept()[0]) as connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/w"
        with pytest.raises(WeightsUnavailableError) as caught:
            fetch(url, path, sha256=SHA256)
        thread.join()
    assert_says_what_to_do(caught.value, url, path, "220 mail.example")


def test_range_of_another_place_is_refused(hub, path, monkeypatch):
    path.parent.mkdir()
    path.with_name("w.safetensors.partial").write_bytes(CONTENT[:10])
    send = _Handler.send_header
    monkeypatch.setattr(
        _Handler,
        "send_header",
        lambda self, k, v: send(self, k, v.replace("bytes 10-", "bytes 0-")),
    )
    with pytest.raises(WeightsUnavailableError, match="asked for 10-, got 'bytes 0-"):
        fetch(hub.url, path, sha256=SHA256)


def test_folder_that_cannot_be_made(hub, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(Error, match=r"cannot be written.*JAXCELLS_CACHE"):
        fetch(hub.url, tmp_path / "cache" / "sub" / "w", sha256=SHA256)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("num_bytes", [100, 300_000])
def test_full_disk(hub, path, num_bytes):
    hub.content = CONTENT[:num_bytes]
    path.parent.mkdir()
    path.with_name("w.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(Error, match=r"partial: cannot be written \(No space left on device\)"):
        fetch(hub.url, path, sha256=SHA256)


def _fetch(url, path, sha256):
    fetch(url, path, sha256=sha256)


def test_processes_at_once_download_once(hub, path):
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_fetch, args=(hub.url, path, SHA256), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert path.read_bytes() == CONTENT
    assert len(hub.requests) == 1


def test_threads_at_once_download_once(hub, path):
    hub.drops = [1000]
    threads = [threading.Thread(target=_fetch, args=(hub.url, path, SHA256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert path.read_bytes() == CONTENT
    assert hub.asked_ranges == [None, "bytes=1000-"]


def test_bar_on_a_terminal_only(hub, path, capsys, monkeypatch):
    fetch(hub.url, path, sha256=SHA256)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    path.unlink()
    fetch(hub.url, path, sha256=SHA256)
    assert "w.safetensors" in capsys.readouterr().err


def test_imagenet_weights_by_name(hub, tmp_path, monkeypatch):
    assert list(IMAGENET_WEIGHTS) == ["resnet18", "resnet34", "resnet50", "resnet152"]
    for name, file in IMAGENET_WEIGHTS.items():
        assert file.repo == f"timm/{name}.tv_in1k"
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
    served = dataclasses.replace(IMAGENET_WEIGHTS["resnet34"], sha256=SHA256)
    monkeypatch.setitem(IMAGENET_WEIGHTS, "resnet34", served)
    monkeypatch.setenv("JAXCELLS_CACHE", str(tmp_path / "mine"))
    path = fetch_imagenet("resnet34", base_url=hub.address)
    assert path == tmp_path / "mine" / "resnet34.tv_in1k.safetensors"
    assert file_sha256(path) == SHA256
    assert hub.requests == [("/timm/resnet34.tv_in1k/resolve/main/model.safetensors", None)]
    other = fetch_imagenet("resnet34", cache=tmp_path / "other", base_url=hub.address)
    assert other == tmp_path / "other" / "resnet34.tv_in1k.safetensors"


@pytest.mark.parametrize("name", ["resnet101", "plain34"])
def test_weights_not_offered(name, tmp_path):
    with pytest.raises(
        Error, match=rf"resnet18, resnet34, .*not for {name};.*--config.init=random"
    ):
        fetch_imagenet(name, cache=tmp_path)


def test_hash_of_a_file_that_is_not_there(tmp_path):
    with pytest.raises(Error, match=r"none: cannot be read \(No such file"):
        file_sha256(tmp_path / "none")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXCELLS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "jaxcells"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jaxcells"
    monkeypatch.setenv("JAXCELLS_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
