"""A proxy in front of an HTTP server that can misbehave as asked: stall, cut, trickle, or answer with an error.

It forwards requests as they are, with their Host header, so that signatures stay valid: give its `url` to a client as the
endpoint. `rule` is asked about every request and says what goes wrong with it, if anything; `seen` keeps every request
in the order of arrival, and what became of it.
"""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

PIECE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one exchange."""

    until: threading.Event | None = None
    """The answer stops until this is set: before its first byte, or after `after_bytes` of its body."""
    after_bytes: int | None = None
    """Bytes of the body that are sent before the fault; None: not even the status line."""
    cut: bool = False
    """Hang up at that point."""
    status: int = 0
    """Answer with this status instead of asking the server."""
    code: str = ""
    """The S3 error code in the body of that answer."""
    trickle: threading.Event | None = None
    """Send the body byte by byte, one every `trickle_s`, until this is set."""
    trickle_s: float = 0.2


@dataclass(kw_only=True)
class Seen:
    """One request, and what the client was sent."""

    method: str
    path: str
    """Path and query."""
    range: tuple[int, int] | None
    """First and last byte asked for."""
    connection: int
    """Number of the client's connection that it came over."""
    body: bytes = field(default=b"", repr=False)
    """Of a POST; of others it is not kept."""
    status: int = 0
    body_bytes: int = 0
    """Bytes of the answer's body that were handed to the network."""
    done: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set when the exchange is over, whichever way."""


Rule = Callable[[Seen], Fault | None]


class FaultProxy:
    """A running proxy. Close it, or use `fault_proxy`."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.rule: Rule = lambda request: None
        self.seen: list[Seen] = []
        self.connections = 0
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.proxy = self
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def note(self, request: Seen) -> None:
        with self.changed:
            self.seen.append(request)
            self.changed.notify_all()

    def wait_for(self, wanted: Callable[[Seen], bool], timeout_s: float = 60) -> Seen:
        """The first request, seen already or to come, that is wanted."""
        with self.changed:
            if not self.changed.wait_for(lambda: any(map(wanted, self.seen)), timeout_s):
                raise TimeoutError(f"no such request among {self.seen}")
            return next(filter(wanted, self.seen))

    def ranges(self) -> list[Seen]:
        """The ranged reads among the requests."""
        return [request for request in list(self.seen) if request.range is not None]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy in front of the server at this URL."""
    proxy = FaultProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def once(wanted: Callable[[Seen], bool], fault: Fault) -> Rule:
    """The rule that the first wanted request meets the fault."""
    lock, met = threading.Lock(), []

    def rule(request: Seen) -> Fault | None:
        with lock:
            if met or not wanted(request):
                return None
            met.append(request)
            return fault

    return rule


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = PIECE
    server: _Server

    def setup(self) -> None:
        super().setup()
        proxy = self.server.proxy
        with proxy.lock:
            proxy.connections += 1
            self.number = proxy.connections
        self.upstream = http.client.HTTPConnection(proxy.upstream.hostname or "", proxy.upstream.port, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()  # else the client waits for a second before it sends its body
        return going_on

    def log_message(self, *_: object) -> None:
        pass

    def _exchange(self) -> None:
        request = Seen(method=self.command, path=self.path, range=_range(self.headers), connection=self.number)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "POST":
            request.body = body
        fault = self.server.proxy.rule(request) or Fault()
        self.server.proxy.note(request)
        try:
            self._answer(request, body, fault)
        finally:
            request.done.set()

    def _answer(self, request: Seen, body: bytes, fault: Fault) -> None:
        if fault.after_bytes is None and not self._passes(fault):
            return
        if fault.status:
            self._refuse(request, fault)
            return
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body or None)
        response = self.upstream.getresponse()
        data = response.read()
        request.status = response.status
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        first = len(data) if fault.after_bytes is None else min(fault.after_bytes, len(data))
        if fault.trickle is not None:
            first = self._trickle(request, data, fault)
        else:
            self._send(request, data[:first])
        if fault.after_bytes is not None and not self._passes(fault):
            return
        self._send(request, data[first:])

    def _passes(self, fault: Fault) -> bool:
        """Whether the exchange goes on after the fault has had its time."""
        self.wfile.flush()
        if fault.until is not None:
            fault.until.wait()
        if fault.cut:
            self.close_connection = True
        return not fault.cut

    def _trickle(self, request: Seen, data: bytes, fault: Fault) -> int:
        assert fault.trickle is not None
        sent = 0
        while sent < len(data) and not fault.trickle.wait(fault.trickle_s):
            self._send(request, data[sent : sent + 1])
            sent += 1
        return sent

    def _send(self, request: Seen, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            piece = data[at : at + PIECE]
            self.wfile.write(piece)
            request.body_bytes += len(piece)
        self.wfile.flush()

    def _refuse(self, request: Seen, fault: Fault) -> None:
        body = b"" if self.command == "HEAD" else f"<Error><Code>{fault.code}</Code></Error>".encode()
        request.status = fault.status
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(request, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _exchange


def _range(headers: http.client.HTTPMessage) -> tuple[int, int] | None:
    value = headers.get("Range", "")
    if not value.startswith("bytes="):
        return None
    first, _, last = value.removeprefix("bytes=").partition("-")
    return int(first), int(last)
