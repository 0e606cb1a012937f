"""A file server on the loopback interface that cuts connections, knows ranges or not, and remembers what was asked."""

from __future__ import annotations

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tools.downloads import File

CONTENT = bytes(i * 7 % 251 for i in range(300_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cut` bytes into an answer it hangs up, as often as `server.cuts` says."""

    protocol_version = "HTTP/1.1"

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        for name, value in self.server.headers.get(self.path, {}).items() if status in (200, 206) else ():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        status, content = server.statuses.get(self.path), server.files.get(self.path)
        if target := server.redirects.get(self.path):
            return self.head(302, Location=target, Content_Length=0)
        if status or content is None:
            self.head(status or 404, Content_Length=len(content or b""))
            return self.wfile.write(content or b"")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if server.ranges else None
        start, size = int(asked[1]) if asked else 0, len(content)
        if asked and start >= size:
            return self.head(416, Content_Range=f"bytes */{size}", Content_Length=0)
        headers = {"Content_Range": f"bytes {start}-{size - 1}/{size}"} if asked else {}
        if server.announced:
            headers["Content_Length"] = size - start
        else:
            self.close_connection = True
        self.head(206 if asked else 200, **headers)
        body = content[start:]
        if server.cuts:
            server.cuts -= 1
            body = body[: server.cut]
            self.close_connection = True
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    """Silent about clients that hang up, as they do where only headers are asked for."""

    def handle_error(self, request, client_address):
        pass


@contextmanager
def loopback(monkeypatch, files):
    """A server of these files (path -> bytes), with no proxy and no mirror in between."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT", "DIFFUSIONOPD_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.statuses, server.headers, server.requests = dict(files), {}, {}, []
    server.ranges, server.cut, server.cuts = True, 100_000, 0
    server.redirects, server.announced = {}, True  # path -> Location; whether Content-Length is sent
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def entry(server, sha256=SHA256, name="file.bin", path="folder/file.bin", **more):
    """The catalogue's entry of a file on the server."""
    return File(path, (f"{server.url}/{name}",), sha256, **more)


def left(root):
    """The files in a folder."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
