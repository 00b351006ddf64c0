"""The live page of a run: `unisono train --serve` shows it on 127.0.0.1 while the run goes on.

A process of its own reads the run's folder, so the run is never slowed by a lock of the interpreter
and never fails with it: the run binds the socket (a port that is taken is one warning), starts the
process, and closes its standard input at the end. The process ends when that input does, which the
kernel sees to however the run dies. It reads files only when somebody asks and a file has changed.

Should it end before the run, the run says so once. What a page costs is bounded: a run's files are read
again at most so often that it takes SHARE of a core, and `/metrics` reads what is new.

It answers GET and HEAD for `/` (the page), `/data.json` (its data) and `/metrics` (Prometheus), only
for requests that name this host, so that no page of another site can read it by rebinding a name.
No torch is imported.
"""

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from unisono.files import Followed
from unisono.observe import folder, report

LOOPBACK = "127.0.0.1"
NICENESS = 19
PATIENCE_S = 20.0
"""How long a client may take to ask."""
ENDING_S = 5.0
SHARE = 0.1
"""Of a core, at most, for reading a long run again and again while a page is open."""


class Server:
    """The process beside a run. `stop` ends it; so does the end of this process."""

    def __init__(self, run: Path, port: int, warn: Callable[[str], None] | None = None) -> None:
        """Raises OSError when the port is taken. Port 0 takes a free one. `warn`: hears of an early end."""
        with socket.create_server((LOOPBACK, port)) as listener:
            self.url = f"http://{LOOPBACK}:{listener.getsockname()[1]}/"
            self._process = subprocess.Popen(
                [sys.executable, "-m", "unisono.observe.serve", str(run), str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is the run's; the page shows how it ends
            )
        self._stopping = False
        self._warn = warn or (lambda _: None)
        self._thread = threading.Thread(
            target=self._wait, args=(run,), name="unisono-serve", daemon=True
        )
        self._thread.start()

    def _wait(self, run: Path) -> None:
        code = self._process.wait()
        if not self._stopping:
            why = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._warn(
                f"--serve: the live page at {self.url} has ended ({why}); training goes on; "
                f"unisono report {run} makes a file of it"
            )

    def stop(self) -> None:
        """Ends the process and waits for it; a second call does nothing."""
        assert self._process.stdin is not None
        self._stopping = True
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._thread.join()


@contextlib.contextmanager
def serving(run: Path, port: int | None, say: Callable[[str], None], warn: Callable[[str], None]) -> Any:  # fmt: skip
    """Serve `run` inside the block; None serves nothing. What goes wrong is one warning."""
    server = None
    if port is not None:
        try:
            server = Server(run, port, warn)
            say(f"live page: {server.url}")
        except OSError as error:
            warn(
                f"--serve: port {port} cannot be used ({error.strerror}): no live page, training "
                f"goes on; choose another, or 0 for a free one"
            )
    try:
        yield server
    finally:
        if server:
            server.stop()


# --- in the process


class Page:
    """What is answered, made anew when a file of the run has changed."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._stamp: tuple[Any, ...] = ()
        self._data: dict[str, Any] = {}
        self._not_before = 0.0
        self._rows = Followed(run / "metrics.jsonl")
        self._newest: dict[str, float] = {}

    def _fresh(self) -> dict[str, Any]:
        with self._lock:
            stamp = tuple(_stamp(self._run / n) for n in (*folder.KNOWN, "timeline.jsonl", "ranks.jsonl", "forecast.json", "probe.json"))  # fmt: skip
            if stamp != self._stamp and time.monotonic() >= self._not_before:
                began = time.thread_time()
                self._data, self._stamp = report.read([self._run]), stamp
                self._not_before = time.monotonic() + (time.thread_time() - began) / SHARE
            return self._data

    def html(self) -> str:
        return report.page(self._fresh(), live=True)

    def json(self) -> str:
        return report.as_json(self._fresh())

    def metrics(self) -> bytes:
        """The newest value of every metric, as Prometheus reads it. Raises ImportError."""
        from prometheus_client import CollectorRegistry, Gauge, generate_latest

        registry = CollectorRegistry()
        for name, value in sorted(self._newest_values().items()):
            safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
            with contextlib.suppress(ValueError):  # two names that differ in a sign only
                Gauge(f"unisono_{safe}", f"{name}, newest row", registry=registry).set(value)
        return bytes(generate_latest(registry))

    def _newest_values(self) -> dict[str, float]:
        with self._lock:
            with contextlib.suppress(OSError):
                anew, rows = self._rows.new()
                if anew:  # a resume has cut rows off
                    self._newest = {}
                for row in rows:
                    self._newest |= folder.numbers(row)
            return dict(self._newest)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of three paths; nothing is read from a request but its path and three headers."""

    timeout = PATIENCE_S
    server_version, sys_version = "unisono", ""
    protocol_version = "HTTP/1.1"
    page: Page

    def do_GET(self) -> None:
        self._answer(*self._respond())

    do_HEAD = do_GET

    def _respond(self) -> tuple[int, str, bytes]:
        # The name tells a rebinding site apart; the port may be that of a tunnel.
        if self.headers.get("Host", "").partition(":")[0] not in (LOOPBACK, "localhost"):
            return 403, "text/plain", b"only for this host\n"
        path = self.path.partition("?")[0]
        try:
            if path == "/":
                return 200, "text/html", self.page.html().encode()
            if path == "/data.json":
                return 200, "application/json", self.page.json().encode()
            if path == "/metrics":
                return 200, "text/plain; version=0.0.4", self.page.metrics()
        except ImportError:
            return 404, "text/plain", b"not installed: pip install 'unisono[prometheus]'\n"
        except Exception as error:
            # A file that is being replaced, a folder not there yet: the next request finds it.
            return 503, "text/plain", f"not now: {type(error).__name__}\n".encode()
        return 404, "text/plain", b"here are /, /data.json and /metrics\n"

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        if status == 200 and self.headers.get("If-None-Match") == tag:
            status, body = 304, b""
        self.send_response(status)
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if status != 304:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is the run's."""


def main(run: Path, fd: int) -> None:
    """Serve until standard input ends."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    server = ThreadingHTTPServer((LOOPBACK, 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=fd)
    server.server_address = server.socket.getsockname()
    server.daemon_threads = True
    Handler.page = Page(run)
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    sys.stdin.buffer.read()


def _serve(server: ThreadingHTTPServer) -> None:
    try:
        server.serve_forever()
    finally:
        os._exit(1)  # a page that does not answer is no page; the run says that it has ended


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
