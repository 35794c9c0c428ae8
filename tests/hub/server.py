"""A small Hub on loopback that speaks the protocol of the real client, and fails when it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER, NARROW, STRANGER = ("hf_" + who * 5 for who in ("writer", "reader", "narrow", "nobody"))
ACCOUNTS: dict[str, dict[str, Any]] = {
    WRITER: {"role": "write"},
    READER: {"role": "read"},
    NARROW: {
        "role": "fineGrained",
        "fineGrained": {
            "scoped": [
                {"entity": {"type": "org", "name": "acme"}, "permissions": ["repo.content.read"]},
                {"entity": {"type": "model", "name": "acme/narrow"}, "permissions": ["repo.write"]},
            ]
        },
    },
}
ORGANIZATIONS = [{"name": "acme", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]


@dataclass
class Repo:
    """Its commits, oldest first: each id -> path -> bytes."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def add(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(str((len(self.commits), sorted(files))).encode())
        self.commits.append((digest.hexdigest(), files))
        return self.head

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = [one for one in self.commits if one[0] == revision]
        return found[0] if found else self.commits[-1] if revision == "main" else None


@dataclass
class Fault:
    """What goes wrong with requests of a method whose path matches, so many times."""

    method: str
    path: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    is_cut: bool = False
    is_slow: bool = False
    """Whether it waits, with all of the body read, until `HubServer.go_on` is set."""


class HubServer:
    """The state behind the requests, and what was asked."""

    writer, reader, narrow, stranger = WRITER, READER, NARROW, STRANGER

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.is_waiting, self.go_on = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.elsewhere = self.url.replace("127.0.0.1", "localhost")
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def create(self, name: str, kind: str = "model", *, private: bool = False, files: Any = None) -> Repo:
        repo = self.repos[kind, name] = Repo(private)
        repo.add({".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {}))
        return repo

    def fail(self, method: str, path: str, *, times: int = 1, **how: Any) -> None:
        self.faults.append(Fault(method, path, times, **how))

    def count(self, pattern: str) -> int:
        """Requests `METHOD /path` so far that match."""
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: the second of two would wait for word of the first
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  (the names are Python's)

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.take_fault(self.command, path)
        self.is_cut = bool(fault and fault.is_cut)
        body = self._read_body()
        if body is None:
            return
        if fault and fault.is_slow:
            self.hub.is_waiting.set()
            self.hub.go_on.wait(60)
        if fault and fault.status:
            words = json.dumps({"error": fault.message}).encode()
            self._send(fault.status, words, {"Content-Type": "application/json"} | fault.headers)
            return
        for method, pattern, answer in ROUTES:
            if method in (self.command, "ANY") and (match := re.fullmatch(pattern, path)):
                answer(self, body, *match.groups())
                return
        self._send_json({"error": "no such page"}, 404)

    def _read_body(self) -> bytes | None:
        """The request's body; None where the connection was to break in the middle of it."""
        length = int(self.headers.get("Content-Length", 0))
        if self.is_cut and self.command == "PUT":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return None
        return self.rfile.read(length)

    @property
    def account(self) -> dict[str, Any] | None:
        return ACCOUNTS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self) -> bool:
        return self.account is not None and self.account["role"] != "read"

    # Answers

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.is_cut and len(body) > 1:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def _send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json"} | (headers or {})
        self._send(status, json.dumps(content).encode(), headers)

    def _refuse(self, status: int, code: str = "", message: str = "no") -> None:
        self._send_json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def _open(self, kind: str, name: str) -> Repo | None:
        """A repository that the caller may see; says so itself where there is none."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.account is None):
            self._refuse(404 if self.account else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    # Pages

    def who(self, _body: bytes) -> None:
        if self.account is None:
            self._refuse(401, message="Invalid credentials in Authorization header")
            return
        token = {"displayName": "test", **self.account}
        auth = {"type": "access_token", "accessToken": token}
        self._send_json({"type": "user", "name": "ann", "orgs": ORGANIZATIONS, "auth": auth})

    def check_yaml(self, _body: bytes) -> None:
        self._send_json({"errors": [], "warnings": []})

    def make(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'ann'}/{asked['name']}"
        if not self._may_write():
            self._refuse(403, message="you may not create that")
        elif (asked.get("type", "model"), name) in self.hub.repos:
            self._refuse(409, message="You already created this model repo")
        else:
            self.hub.create(name, private=asked.get("visibility") == "private")
            self._send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def info(self, _body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        repo = self._open(kind, name)
        if repo is None:
            return
        found = repo.find(revision or "main")
        if found is None:
            self._refuse(404, "RevisionNotFound", "no such revision")
            return
        siblings = [{"rfilename": path} for path in found[1]]
        about = {"_id": "1", "id": name, "sha": found[0], "private": repo.private, "tags": [], "siblings": siblings}
        self._send_json(about)

    def tree(self, _body: bytes, name: str, revision: str) -> None:
        repo = self._open("model", name)
        if repo is None:
            return
        found = repo.find(revision)
        assert found is not None
        entries = []
        for path, content in found[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if is_large(path):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._send_json(entries)

    def preupload(self, body: bytes, name: str, _revision: str) -> None:
        repo = self._open("model", name)
        if repo is None:
            return
        answers = []
        for file in json.loads(body)["files"]:
            content = repo.files.get(file["path"])
            mode = "lfs" if is_large(file["path"]) else "regular"
            oid = None if content is None else sha256(content) if mode == "lfs" else git_oid(content)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answers})

    def batch(self, body: bytes, _name: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = wanted["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}
            objects.append(wanted | ({} if known else {"actions": upload}))
        self._send_json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            self._refuse(400, message="wrong checksum")
            return
        self.hub.objects[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, name: str, _revision: str) -> None:
        repo = self._open("model", name)
        if repo is None:
            return
        if not self._may_write():
            self._refuse(403, message="you may not write there")
            return
        files = dict(repo.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]  # a pointer to nothing is a failure here
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.add(files)
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def resolve(self, _body: bytes, name: str, revision: str, path: str) -> None:
        repo = self._open("model", name)
        if repo is None:
            return
        oid, files = repo.find(revision) or ("", {})
        if path not in files:
            self._refuse(404, "EntryNotFound", "no such file")
            return
        content, headers = files[path], {"X-Repo-Commit": oid}
        if is_large(path):  # large files lie on another host, to which the client does not send its token
            linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", headers | linked | {"Location": f"{self.hub.elsewhere}/elsewhere/{sha256(content)}"})
            return
        self._send(200, content, headers | {"ETag": f'"{git_oid(content)}"'})

    def elsewhere(self, _body: bytes, oid: str) -> None:
        content = next(data for repo in self.hub.repos.values() for data in repo.files.values() if sha256(data) == oid)
        headers = {"ETag": f'"{oid}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self._send(206, content[start:], headers | span)
            return
        self._send(200, content, headers)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("POST", r"/api/validate-yaml", _Handler.check_yaml),
    ("POST", r"/api/repos/create", _Handler.make),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/(model|dataset|space)s/{NAME}", _Handler.info),
    ("GET", rf"/api/(model|dataset|space)s/{NAME}/revision/(.+)", _Handler.info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/(\w+)", _Handler.upload),
    ("ANY", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("ANY", r"/elsewhere/(\w+)", _Handler.elsewhere),
]


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
