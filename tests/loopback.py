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

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        status = server.statuses.get(self.path)
        content = server.files.get(self.path)
        if target := server.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status or content is None:
            self.send_response(status or 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")
            return
        start = 0
        if server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(asked[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.announced:
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.close_connection = True
        for name, value in server.headers.get(self.path, {}).items():
            self.send_header(name, value)
        self.end_headers()
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
