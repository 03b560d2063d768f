"""Objects that are written to a real S3 server whose answers get lost: whole in the end, as they were meant."""

from collections.abc import Iterator

import pytest

from cxr_dist import storage
from tests.faultproxy import Fault, FaultProxy, Seen, fault_proxy, once


@pytest.fixture
def proxy(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The proxy, and storage that goes through it."""
    with fault_proxy(s3_env["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        storage.forget_filesystems()
        yield found
    monkeypatch.undo()
    storage.forget_filesystems()


def completes(request: Seen) -> bool:
    """Whether the request puts an upload's parts together."""
    return request.method == "POST" and "uploadId=" in request.path


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [
        pytest.param(completes, Fault(status=500, code="InternalError"), id="completion refused"),
        pytest.param(completes, Fault(after_bytes=20, cut=True), id="completion done, its answer cut"),
        pytest.param(lambda r: "uploads" in r.path, Fault(status=503, code="SlowDown"), id="no upload begun"),
        pytest.param(lambda r: "partNumber" in r.path, Fault(after_bytes=0, cut=True), id="a part's answer cut"),
    ],
)
@pytest.mark.parametrize("size", [100, 12 << 20])
def test_what_is_written_is_whole(proxy: FaultProxy, wanted, fault: Fault, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"end"
    uri = f"s3://cxr/writes/{size}"
    met: list[Seen] = []

    def noted(request: Seen) -> bool:
        if wanted(request):
            met.append(request)
        return wanted(request)

    proxy.rule = once(noted, fault)
    storage.put_atomic(uri, data)
    assert met
    proxy.rule = lambda request: None
    assert storage.read_bytes(uri) == data
