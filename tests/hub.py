"""A stand-in for the Hugging Face hub on the loopback interface: repositories of files that come in one commit."""

from __future__ import annotations

import base64
import json
import re
from contextlib import contextmanager

from huggingface_hub import constants

from .loopback import Handler, loopback

TOKEN = "hf_" + "Q7x" * 10


class Hub(Handler):
    """Answers what a client asks to make a repository, look at it and commit to it; `server.repositories` by name."""

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.head(status, Content_Type="application/json", Content_Length=len(body), **headers)
        self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        repository = self.server.repositories.get(self.path.removeprefix("/api/models/"))
        if repository is None:
            return self.answer({}, 404, X_Error_Code="RepoNotFound")
        files = [{"rfilename": name} for name in repository["files"]]
        self.answer({"id": "x", "private": repository["private"], "siblings": files})

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b"".join(self.chunks())
        self.server.requests.append((self.command, self.path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            new = {
                "private": asked.get("private", asked.get("visibility") == "private"),
                "files": {".gitattributes": b""},
            }
            self.server.repositories.setdefault(name, new)
            return self.answer({"url": f"{self.server.url}/{name}"})
        if "/preupload/" in self.path:
            asked = json.loads(content)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer({"files": files})
        if found := re.fullmatch("/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    name, data = line["value"]["path"], base64.b64decode(line["value"]["content"])
                    self.server.repositories[found[1]]["files"][name] = data
            return self.answer(
                {"commitUrl": f"{self.server.url}/{found[1]}/commit/1", "commitOid": "1", "success": True}
            )
        self.answer({})  # the check of the card's header

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()


@contextmanager
def hub(monkeypatch):
    """The hub of this process's clients, who are logged in."""
    with loopback(monkeypatch, {}) as server:
        server.RequestHandlerClass, server.repositories = Hub, {}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
