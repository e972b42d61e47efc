"""Metadata services of the providers, as their documentation describes them, on a server of the test."""

import http.server
import threading

import pytest

from ktray.accounting import device, provider

GOOGLE = {
    "/computeMetadata/v1/instance/machine-type": "projects/123/machineTypes/g2-standard-8",
    "/computeMetadata/v1/instance/scheduling/preemptible": "TRUE",
}
AWS = {"/latest/meta-data/instance-type": "g6.4xlarge", "/latest/meta-data/instance-life-cycle": "on-demand"}


@pytest.fixture
def service():
    answers: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, known):
            text = answers.get(self.path) if known else None
            self.send_response(200 if text is not None else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def do_GET(self):
            google = self.path.startswith("/computeMetadata")
            header = ("Metadata-Flavor", "Google") if google else ("X-aws-ec2-metadata-token", "secret")
            self.answer(self.headers.get(header[0]) == header[1])

        def do_PUT(self):
            self.answer("X-aws-ec2-metadata-token-ttl-seconds" in self.headers)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOGLE, {"instance": "g2-standard-8", "market": "spot"}),
        ({**AWS, "/latest/api/token": "secret"}, {"instance": "g6.4xlarge", "market": "on-demand"}),
        (AWS, {}),  # without a token, AWS answers nothing
        ({}, {}),
    ],
)
def test_the_type_and_the_market_of_a_machine(service, content, expected):
    url, answers = service
    answers.update(content)
    assert provider.machine_type(url) == expected


def test_no_service_is_no_error(service):
    url, _ = service
    assert provider.machine_type(url.replace("127.0.0.1", "127.0.0.2")) == {}


def test_what_is_declared_holds_and_the_rest_is_found(monkeypatch):
    monkeypatch.setattr(device, "machine_type", lambda: {"instance": "found", "market": "spot"})
    monkeypatch.setattr(device, "_nvml_gpus", lambda: [{"name": "NVIDIA L4", "memory_bytes": 24}] * 2)
    found = device.describe_node(1)
    assert (found["instance"], found["market"]) == ("found", "spot")
    assert found["gpus"] == [{"name": "NVIDIA L4", "memory_bytes": 24}]
    monkeypatch.setenv("KTRAY_INSTANCE", "declared")
    monkeypatch.setenv("KTRAY_ACCELERATOR", "TPU v9")
    found = device.describe_node(2)
    assert (found["instance"], found.get("market")) == ("declared", None)
    assert [gpu["name"] for gpu in found["gpus"]] == ["TPU v9", "TPU v9"]
