import contextlib
import hashlib
import http.server
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxcells import Error
from jaxcells.models.fetch import IMAGENET_WEIGHTS, WeightsUnavailableError, fetch_imagenet

# More than the hub's library reads at a time: what it has is then kept when a connection breaks.
CONTENT = np.random.default_rng(0).bytes(12_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
URL = "/timm/resnet34.tv_in1k/resolve/main/model.safetensors"


class _Hub(http.server.BaseHTTPRequestHandler):
    """What `huggingface_hub` asks of a hub, for one file."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        hub.requests.append((self.command, self.path, self.headers["Range"]))
        if hub.status != 200:
            self.send_error(hub.status)
            return
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        self.send_response(206 if start else 200)
        if start:
            last, total = len(hub.content) - 1, len(hub.content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{total}")
        self.send_header("Content-Length", str(len(hub.content) - start))
        self.send_header("ETag", '"an etag"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            end = hub.breaks_at.pop(0) if hub.breaks_at else None
            with contextlib.suppress(ConnectionError):
                self.wfile.write(hub.content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server; `breaks_at` holds, for each coming download, where in the file it breaks off."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JAXCELLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(IMAGENET_WEIGHTS, "resnet34", SHA256)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.content, server.status, server.breaks_at, server.requests = CONTENT, 200, [], []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "resnet34.tv_in1k.safetensors"


def _files(path):
    return {p.name for p in path.parent.iterdir()} - {f"{path.name}.lock"}


def test_download_and_reuse_without_network_or_chatter(hub, path, capfd):
    assert fetch_imagenet("resnet34", endpoint=hub.url) == path
    assert path.read_bytes() == CONTENT
    assert _files(path) == {path.name}
    assert ("GET", URL, None) in hub.requests
    hub.requests.clear()
    assert fetch_imagenet("resnet34", endpoint=hub.url) == path
    assert hub.requests == []
    assert capfd.readouterr() == ("", "")


def test_threads_at_once_download_once(hub, path):
    threads = [
        threading.Thread(target=fetch_imagenet, args=("resnet34",), kwargs={"endpoint": hub.url})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert path.read_bytes() == CONTENT
    assert [request for request in hub.requests if request[0] == "GET"] == [("GET", URL, None)]


def test_broken_connection_is_taken_up_where_it_broke(hub, path, capfd):
    hub.breaks_at = [11_000_000]
    fetch_imagenet("resnet34", endpoint=hub.url)
    assert path.read_bytes() == CONTENT
    first, second = [asked for method, _, asked in hub.requests if method == "GET"]
    assert (first, re.fullmatch(r"bytes=[1-9]\d{6,7}-", second) is not None) == (None, True)
    assert capfd.readouterr() == ("", "")


def test_connection_that_always_breaks_is_given_up(hub, path, monkeypatch, capfd):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.breaks_at = [0] * 20
    _assert_unavailable(hub.url, path, "without sending complete message")
    assert 0 < len(hub.breaks_at) < 20
    assert _files(path) == set()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"X", CONTENT[:-1], b"<html>not here</html>"])
def test_file_of_another_hash_is_refused_now_and_later(hub, path, content):
    hub.content = content
    for _ in range(2):
        with pytest.raises(Error) as caught:
            fetch_imagenet("resnet34", endpoint=hub.url)
        assert not isinstance(caught.value, WeightsUnavailableError)
        for part in (SHA256, hashlib.sha256(content).hexdigest(), str(path), "delete it", "random"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_copy_put_there_by_hand_is_taken(hub, path):
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch_imagenet("resnet34", endpoint=hub.url) == path
    assert hub.requests == []


def _assert_unavailable(endpoint, path, reason):
    start = time.monotonic()
    with pytest.raises(WeightsUnavailableError) as caught:
        fetch_imagenet("resnet34", endpoint=endpoint)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "\n" not in message
    for part in (endpoint + URL, str(path), SHA256, "JAXCELLS_CACHE", "init=random", reason):
        assert part in message


@pytest.mark.parametrize("status", [404, 401, 503])
def test_hub_without_the_file(hub, path, status):
    hub.status = status
    _assert_unavailable(hub.url, path, str(status))
    assert _files(path) == set()


def test_nobody_answers(hub, path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        _assert_unavailable(f"http://127.0.0.1:{unused.getsockname()[1]}", path, "refused")


def test_cache_that_cannot_be_made(hub, path):
    path.parent.write_text("a file")
    _assert_unavailable(hub.url, path, "File exists")


@pytest.mark.parametrize("name", ["resnet101", "plain34", "preact50"])
def test_weights_not_offered(name):
    with pytest.raises(Error, match=rf"for resnet18, resnet34, .*not for {name};.*init=random"):
        fetch_imagenet(name)


def test_hashes_and_folder_of_the_user(monkeypatch, tmp_path):
    assert list(IMAGENET_WEIGHTS) == ["resnet18", "resnet34", "resnet50", "resnet152"]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in IMAGENET_WEIGHTS.values())
    monkeypatch.delenv("JAXCELLS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "jaxcells" / "resnet18.tv_in1k.safetensors"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    monkeypatch.setitem(IMAGENET_WEIGHTS, "resnet18", SHA256)
    assert fetch_imagenet("resnet18") == file


def test_the_library_of_the_hub_is_not_imported_before_it_is_needed():
    code = "import sys, jaxcells.models.fetch; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
