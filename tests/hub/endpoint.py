"""A Hub on this machine, for tests: what `huggingface_hub` says to one, over loopback, without the network.

    endpoint = Endpoint(folder)         # its repositories live in the folder, also for the next endpoint on it
    environment = endpoint.environment  # of a process that is to talk to it, before it imports huggingface_hub

Repositories have branches of commits, as git's. A commit names all files of its revision by the hash of their content
and appears in one rename, after every content it names: readers see the former revision or the new one. Files above
`REGULAR_BYTES` and weights travel by the LFS protocol, before the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"
TOKEN = "hf_test"
REGULAR_BYTES = 10_000
_BINARY = (".safetensors", ".bin", ".pt", ".pth")


class Problem(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.status, self.code = status, code


class Store:
    """Repositories in a folder: objects/SHA256, and a JSON file of branches and commits for each repository."""

    def __init__(self, folder: Path) -> None:
        self.objects, self.repositories = folder / "objects", folder / "repositories"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.repositories.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()

    def put(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        _write(self.objects / name, content)
        return name

    def content(self, entry: dict[str, Any]) -> bytes:
        return (self.objects / entry["sha256"]).read_bytes()

    def create(self, repo_id: str) -> bool:
        """Whether it is new. As the Hub's, a new repository has one commit."""
        if self._path(repo_id).exists():
            return False
        first = {"files": {".gitattributes": self.entry(b"*.safetensors filter=lfs\n")}, "message": "initial commit"}
        self._save(repo_id, {"branches": {"main": [first | {"oid": _oid(None, first)}]}})
        return True

    def entry(self, content: bytes, lfs: bool = False) -> dict[str, Any]:
        return {"sha256": self.put(content), "size": len(content), "lfs": lfs, "blob": _blob(content)}

    def load(self, repo_id: str) -> dict[str, Any]:
        if not self._path(repo_id).is_file():
            raise Problem(404, f"there is no repository {repo_id}", "RepoNotFound")
        return json.loads(self._path(repo_id).read_text())

    def history(self, repo_id: str, branch: str = "main") -> list[dict[str, Any]]:
        """Commits of a branch, the oldest first."""
        branches = self.load(repo_id)["branches"]
        if branch not in branches:
            raise Problem(404, f"{repo_id} has no revision {branch}", "RevisionNotFound")
        return branches[branch]

    def revision(self, repo_id: str, revision: str) -> dict[str, Any]:
        """The commit that a branch's name or a hash stands for."""
        for branch, commits in self.load(repo_id)["branches"].items():
            if branch == revision:
                return commits[-1]
            for commit in commits:
                if commit["oid"] == revision:
                    return commit
        raise Problem(404, f"{repo_id} has no revision {revision}", "RevisionNotFound")

    def branch(self, repo_id: str, name: str, start: str = "main") -> None:
        with self.lock:
            state = self.load(repo_id)
            if name in state["branches"]:
                raise Problem(409, f"{name} exists")
            state["branches"][name] = list(self.history(repo_id, start))
            self._save(repo_id, state)

    def commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """All of the operations or none."""
        with self.lock:
            parent = self.history(repo_id, branch)[-1]
            files = dict(parent["files"])
            header = next(line["value"] for line in lines if line["key"] == "header")
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = self.entry(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if not (self.objects / value["oid"]).is_file():
                        raise Problem(400, f"the content of {value['path']} was never uploaded")
                    files[value["path"]] = self.entry((self.objects / value["oid"]).read_bytes(), lfs=True)
                elif line["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise Problem(404, f"there is no {value['path']} to delete", "EntryNotFound")
                elif line["key"] != "header":
                    raise Problem(400, f"unknown operation {line['key']}")
            made = {"files": files, "message": header["summary"]}
            made["oid"] = _oid(parent["oid"], made)
            state = self.load(repo_id)
            state["branches"][branch].append(made)
            self._save(repo_id, state)
            return made

    def _path(self, repo_id: str) -> Path:
        return self.repositories / (repo_id.replace("/", "--") + ".json")

    def _save(self, repo_id: str, state: dict[str, Any]) -> None:
        _write(self._path(repo_id), json.dumps(state).encode())


class Endpoint:
    """The server, in a thread of this process.

    hold_transfers: LFS uploads stop after their first bytes until `release` is set; `transferring` is set then.
    refuse: status that every commit is answered with, for tests of failures.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.store = Store(folder)
        self.hold_transfers = self.closed = False
        self.refuse: int | None = None
        self.transferring, self.release = threading.Event(), threading.Event()
        self.requests: list[str] = []
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.endpoint = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.store.revision(repo_id, revision)["files"]) - {".gitattributes"}

    def text(self, repo_id: str, path: str, revision: str = "main") -> str:
        return self.store.content(self.store.revision(repo_id, revision)["files"][path]).decode()

    def write(self, repo_id: str, path: str, text: str) -> None:
        """A commit of one file, as people make it on the Hub's pages."""
        content = base64.b64encode(text.encode()).decode()
        header = {"key": "header", "value": {"summary": f"Update {path}"}}
        self.store.commit(repo_id, "main", [header, {"key": "file", "value": {"path": path, "content": content}}])

    def messages(self, repo_id: str, branch: str = "main") -> list[str]:
        """Of the commits, without the first one of every repository."""
        return [commit["message"] for commit in self.store.history(repo_id, branch)[1:]]

    def close(self) -> None:
        """Gone in the middle of whatever is under way: open connections break, new ones are refused."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            with suppress(OSError):  # closed by the other side already
                connection.shutdown(socket.SHUT_RDWR)
        self.release.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    endpoint: Endpoint

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[Any] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None: ...

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    # ---- in and out
    def _answer(self) -> None:
        endpoint = self.server.endpoint
        path = unquote(urlsplit(self.path).path)
        endpoint.requests.append(f"{self.command} {path}")
        try:
            if self.command == "PUT" and path.startswith("/lfs/"):
                self._receive_object(path.removeprefix("/lfs/"))
                return
            body = b"".join(self._chunks())
            for pattern, serve in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    serve(self, body, **match.groupdict())
                    return
            raise Problem(404, f"this endpoint doesn't know {self.command} {path}")
        except Problem as problem:
            headers = {"X-Error-Code": problem.code} if problem.code else {}
            self._send({"error": str(problem)}, problem.status, headers | {"X-Error-Message": str(problem)})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionError("the client is gone")
            left -= len(piece)
            yield piece

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _receive_object(self, oid: str) -> None:
        endpoint = self.server.endpoint
        content = b""
        for piece in self._chunks():
            content += piece
            if endpoint.hold_transfers:
                endpoint.transferring.set()
                endpoint.release.wait()
            if endpoint.closed:
                raise ConnectionError("this endpoint is gone")
        if hashlib.sha256(content).hexdigest() != oid:
            raise Problem(400, "the content isn't what its hash says")
        endpoint.store.put(content)
        self._send({})

    # ---- what is asked
    def _who(self, body: bytes) -> None:
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._send({"type": "user", "name": USER, "orgs": [], "auth": token})

    def _valid(self, body: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def _create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Problem(401, "Invalid credentials in Authorization header")
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        new = self.server.endpoint.store.create(repo_id)
        url = f"{self.server.endpoint.url}/{repo_id}"
        self._send({"url": url, "name": repo_id, "id": repo_id}, 200 if new else 409)

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        self.server.endpoint.store.branch(repo, branch)
        self._send({})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        commit = self.server.endpoint.store.revision(repo, revision or "main")
        siblings = [{"rfilename": name} for name in commit["files"]]
        self._send({"_id": repo, "id": repo, "sha": commit["oid"], "private": False, "tags": [], "siblings": siblings})

    def _tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        files = self.server.endpoint.store.revision(repo, revision)["files"]
        below = {name: entry for name, entry in files.items() if not folder or name.startswith(f"{folder}/")}
        self._send([_description(name, entry) for name, entry in below.items()])

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        there = self.server.endpoint.store.revision(repo, revision)["files"]
        answers = []
        for file in json.loads(body)["files"]:
            lfs = file["size"] > REGULAR_BYTES or file["path"].endswith(_BINARY)
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if entry := there.get(file["path"]):
                answer["oid"] = entry["sha256"] if entry["lfs"] else entry["blob"]
            answers.append(answer)
        self._send({"files": answers})

    def _batch(self, body: bytes, repo: str) -> None:
        endpoint, objects = self.server.endpoint, []
        for asked in json.loads(body)["objects"]:
            known = (endpoint.store.objects / asked["oid"]).is_file()
            upload = {"upload": {"href": f"{endpoint.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append({"oid": asked["oid"], "size": asked["size"]} | ({} if known else {"actions": upload}))
        self._send({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        endpoint = self.server.endpoint
        if endpoint.refuse is not None:
            raise Problem(endpoint.refuse, "commits are refused")
        made = endpoint.store.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        url = f"{endpoint.url}/{repo}/commit/{made['oid']}"
        self._send({"success": True, "commitUrl": url, "commitOid": made["oid"], "hookOutput": ""})

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        store = self.server.endpoint.store
        commit = store.revision(repo, revision)
        entry = commit["files"].get(path)
        if entry is None:
            raise Problem(404, f"there is no {path}", "EntryNotFound")
        headers = {"ETag": f'"{entry["sha256"]}"', "X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        self._send(store.content(entry), headers=headers | {"Content-Type": "application/octet-stream"})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/models/{_REPO}"
_ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", _Handler._who),
    (r"POST /api/validate-yaml", _Handler._valid),
    (r"POST /api/repos/create", _Handler._create),
    (rf"POST {_API}/branch/(?P<branch>.+)", _Handler._branch),
    (rf"POST {_API}/preupload/(?P<revision>.+)", _Handler._preupload),
    (rf"POST {_API}/commit/(?P<revision>.+)", _Handler._commit),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler._tree),
    (rf"GET {_API}(/revision/(?P<revision>.+))?", _Handler._info),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
]


def _description(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": entry["size"], "oid": entry["blob"]}
    if entry["lfs"]:
        found["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
    return found


def _blob(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(parent: str | None, commit: dict[str, Any]) -> str:
    return hashlib.sha1(json.dumps([parent, commit], sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    aside.write_bytes(content)
    os.replace(aside, path)
