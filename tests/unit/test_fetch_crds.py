"""KubeRay's definitions are fetched whole or not at all."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra.kubernetes import fetch_crds
from tests.manifests import KINDS


@pytest.fixture
def mirror() -> Iterator[HTTPServer]:
    """A server that has one definition, and something else under the other's name."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.path.endswith("rayclusters.yaml") or self.path.startswith("/good/")
            body = b"kind: CustomResourceDefinition\n" if good else b"<html>sign in</html>"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_definitions_are_fetched_whole_or_not_at_all(
    mirror: HTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{mirror.server_port}"
    assert fetch_crds.main([str(tmp_path / "crds"), "--source", f"{address}/good"]) == 0
    assert {file.name for file in (tmp_path / "crds").iterdir()} == set(fetch_crds.FILES) == set(KINDS.values())
    assert fetch_crds.main([str(tmp_path / "other"), "--source", address]) == 1
    assert "rayjobs.yaml is no custom resource definition" in capsys.readouterr().err
    assert {file.name for file in (tmp_path / "other").iterdir()} == {"ray.io_rayclusters.yaml"}


def test_a_place_that_cannot_be_reached_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_crds.main([str(tmp_path), "--source", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9/ray.io_rayclusters.yaml cannot be read" in capsys.readouterr().err
