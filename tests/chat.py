"""A chat server on the loopback interface that answers as a test says and remembers what was asked."""

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from PIL import Image

Reply = tuple[int, dict[str, str], str]


def chat(answer: str | None, first: Mapping[str, float] | None = None) -> Reply:
    """A completion; ``first``: token -> probability, of its first token."""
    choice: dict = {"message": {"role": "assistant", "content": answer}}
    if first is not None:
        listed = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in first.items()]
        choice["logprobs"] = {"content": [{"token": answer, "logprob": 0.0, "top_logprobs": listed}]}
    return 200, {}, json.dumps({"choices": [choice]})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "ChatServer"

    def do_GET(self):
        self.send(self.server.models if self.path == "/v1/models" else (404, {}, "no such page"))

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(SimpleNamespace(path=self.path, headers=dict(self.headers), body=body))
            number, server.under_way = len(server.requests), server.under_way + 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            reply = server.answer(number, body)
        finally:
            with server.lock:
                server.under_way -= 1
        self.send(reply)

    def send(self, reply: Reply):
        status, headers, text = reply
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:  # the client has given up
            self.close_connection = True

    def log_message(self, *_):
        pass


class ChatServer(ThreadingHTTPServer):
    """Answers by `answer(number of the request, its body)`."""

    allow_reuse_address = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.lock, self.requests, self.under_way, self.most_under_way = threading.Lock(), [], 0, 0
        self.models: Reply = (200, {}, '{"data": []}')
        self.answer: Callable[[int, dict], Reply] = lambda number, body: chat("Final Score: 4")
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def grey(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def sent_image(body: dict) -> Image.Image:
    url = next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def sent_text(body: dict) -> str:
    """The text of the user's message, wherever the image is."""
    return next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
