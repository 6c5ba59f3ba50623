"""A server on this machine with the protocol of huggingface_hub: repositories to download, and to publish to."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """Repositories by name, each a folder; what was published, file by file; and which requests came."""

    repositories: dict[str, Path]
    published: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    address: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Of a program that is to use this hub and no other."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[LocalHub]:
    """The hub, on a free port, until the block ends."""
    hub = LocalHub(repositories)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        if not path.startswith("api/models/"):
            self._file(body=True)
            return
        name, _, rest = _name(path.removeprefix("api/models/"))
        files = self._files(name)
        if files is None:
            self._respond({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif rest.startswith("tree"):
            self._respond([{"type": "file", "path": n, "size": len(d), "oid": _sha1(d)} for n, d in files.items()])
        else:
            siblings = [{"rfilename": each} for each in files]
            self._respond(
                {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.tokens.add(self.headers.get("Authorization") or "")
        path = self.path.partition("?")[0].removeprefix("/")
        if path == "api/repos/create":
            values = json.loads(body)
            self.hub.created.append(values)
            owner = f"{values['organization']}/" if values.get("organization") else ""
            self._respond({"url": f"{self.hub.address}/{owner}{values['name']}"})
        elif path == "api/validate-yaml":
            self._respond({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False} for each in json.loads(body)["files"]
            ]  # fmt: skip
            self._respond({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._respond(
                {"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]}
            )
        elif path.endswith("/commit/main"):
            self._commit(_name(path.removeprefix("api/models/"))[0], body)
        else:
            self._respond({"error": path}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.hub.blobs[hashlib.sha256(body).hexdigest()] = body
        self._respond({})

    def _upload(self, request: dict[str, Any]) -> dict[str, Any]:
        return {**request, "actions": {"upload": {"href": f"{self.hub.address}/blob/{request['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.published.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        address = f"{self.hub.address}/{name}/commit/{COMMIT}"
        self._respond({"success": True, "commitUrl": address, "commitOid": COMMIT})

    def _files(self, name: str) -> dict[str, bytes] | None:
        folder = self.hub.repositories.get(name)
        if folder is not None:
            there = sorted(path for path in folder.rglob("*") if path.is_file())
            return {str(path.relative_to(folder)): path.read_bytes() for path in there}
        return self.hub.published.get(name) or ({} if any(_is(name, each) for each in self.hub.created) else None)

    def _file(self, body: bool) -> None:
        name, _, rest = _name(self.path.partition("?")[0].removeprefix("/"))
        data = (self._files(name) or {}).get(rest.removeprefix(f"resolve/{COMMIT}/"))
        if data is None:
            self._respond({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"}, body)
            return
        self.send_response(200)
        for key, value in {
            "ETag": f'"{_sha1(data)}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _respond(
        self, values: Any, status: int = 200, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _name(path: str) -> tuple[str, str, str]:
    """ORG/NAME, and what follows it."""
    owner, _, rest = path.partition("/")
    name, slash, rest = rest.partition("/")
    return f"{owner}/{name}", slash, rest


def _is(name: str, created: dict[str, Any]) -> bool:
    return f"{created.get('organization')}/{created['name']}" == name


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
