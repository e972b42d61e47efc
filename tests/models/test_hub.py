"""Whether published weights can be had, against a small server that speaks as the hub does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from ktray.models import hub

FILES = ("model.safetensors", "pytorch_model.bin")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A hub with the repositories ``mine/safe`` (first file), ``mine/old`` (second file) and ``mine/closed`` (licence
    not accepted); ``silent`` makes it wait, and ``portal`` makes it answer as the login page of a network."""
    state = SimpleNamespace(asked=[], silent=0.0, portal=False)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.asked.append(self.path)
            time.sleep(state.silent)
            owner_name, file = "/".join(self.path.split("/")[1:3]), self.path.rpartition("/")[2]
            there = {"mine/safe": FILES[0], "mine/old": FILES[1]}.get(owner_name) == file
            if state.portal:
                self.send_response(200)
            elif there:
                self.send_response(200)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", '"abc"')
            elif owner_name == "mine/closed":
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{http.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{address}/{template.partition('{repo_id}')[1]}{template.partition('{repo_id}')[2]}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._answers.cache_clear()
    yield state
    hub._answers.cache_clear()
    http.shutdown()


def test_the_hub_is_asked_once_for_one_of_the_files(server: SimpleNamespace) -> None:
    for repository in ("mine/safe", "mine/safe/", "mine/old"):
        assert hub.available(repository, FILES) == "its hub answers"
    assert len(server.asked) == 3  # mine/safe once, mine/old for both names
    assert hub.available("mine/none", FILES) == ""
    assert hub.available("mine/closed", FILES) == ""


def test_the_login_page_of_a_network_is_not_the_hub(server: SimpleNamespace) -> None:
    server.portal = True
    assert hub.available("mine/safe", FILES) == ""


def test_a_silent_network_costs_no_more_than_the_time_limit(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    server.silent = 5.0
    began = time.monotonic()
    assert hub.available("mine/safe", FILES) == ""
    assert hub.available("mine/safe", FILES) == ""  # the answer is kept
    assert time.monotonic() - began < 2


def test_offline_mode_is_respected(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.available("mine/safe", FILES) == ""
    assert server.asked == []


def test_files_in_the_cache_need_no_hub(server: SimpleNamespace, tmp_path: Path) -> None:
    """The layout of the cache as its documentation gives it: refs/BRANCH names a commit, snapshots/COMMIT the files."""
    home = tmp_path / "cache" / "models--mine--kept"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("1" * 40)
    (home / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (home / "snapshots" / ("1" * 40) / FILES[1]).write_bytes(b"weights")
    assert hub.available("mine/kept", FILES) == "its files are in the local cache of its hub"
    assert server.asked == []
    assert hub.available("mine/kept", FILES[:1]) == ""
