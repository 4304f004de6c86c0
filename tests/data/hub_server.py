"""A stand-in for the Hugging Face hub on this machine: models that are pushed and loaded, data sets that are read in parts.

As the real one it takes tensors by the batch API of Git LFS, and sends whoever wants them to where they lie. Its third way, xet,
is switched off in the client, by what the client documents for that.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from xfusion.data import shards


class Hub(ThreadingHTTPServer):
    """What the hub client asks of a hub, in memory; and what of its files was fetched.

    Repositories are lists of commits, each a name and a dictionary of files: models by ``ORG/NAME``, data sets by
    ``datasets/ORG/NAME``.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        """Contents that came by LFS, by their SHA-256."""
        self.fetched: list[tuple[str, int]] = []
        self.out_of_order = False
        self.takes_no_uploads = False

    def at(self, repository, revision):
        """A commit by its name or the beginning of it, or the last one; None where there is none of this name."""
        commits = self.commits[repository]
        matches = (c for c in commits if c[0] == revision or (len(revision) >= 7 and c[0].startswith(revision)))
        return next(matches, commits[-1] if revision == "main" and commits else None)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def _send(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what):
        self._send({"error": "not found"}, 404, X_Error_Code=f"{what}NotFound")

    def _route(self):
        """The path in its parts, and the repository that it names."""
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        if api:
            parts = parts[2:] if parts[1] == "models" else parts[1:]
        size = 3 if parts[0] == "datasets" else 2
        return api, "/".join(parts[:size]), parts[size:]

    def _create(self, body):
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        self.server.commits.setdefault(name, [("0" * 40, {".gitattributes": b""})])
        self._send({"url": f"{self.server.address}/{name}"})

    def _commit(self, name, body):
        commits = self.server.commits[name]
        files = dict(commits[-1][1]) if commits else {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        commits.append((oid, files))
        self._send({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _batch(self, body):
        request = json.loads(body)
        assert request["operation"] == "upload" and "basic" in request["transfers"] and request["hash_algo"] == "sha256"
        objects = []
        for item in request["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.large:
                upload = {"href": f"{self.server.address}/lfs/{item['oid']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.server.address}/lfs-verify"}}
            objects.append(entry)
        self._send({"transfer": "basic", "objects": objects})

    def do_PUT(self):
        body, oid = self._body(), self.path.rpartition("/")[2]
        if self.server.takes_no_uploads:
            return self._send({"error": "no room"}, 403)
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        return self._send({})

    def do_POST(self):
        body = self._body()
        if self.path == "/api/repos/create":
            return self._create(body)
        if self.path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if self.path == "/lfs-verify":
            request = json.loads(body)
            return self._send({}, 200 if len(self.server.large[request["oid"]]) == request["size"] else 404)
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(body)
        _, name, (verb, revision) = self._route()
        if name not in self.server.commits:
            return self._missing("Repo")
        if verb == "preupload":
            request = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in request}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self._send({"files": files})
        if verb == "commit":
            return self._commit(name, body)
        commit = self.server.at(name, revision)
        if verb != "paths-info" or commit is None:
            return self._missing("Revision")
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text)["paths"]
        return self._send(_entries({k: v for k, v in commit[1].items() if k in paths}))

    def do_GET(self):
        if self.server.out_of_order:
            return self._send({"error": "out of order"}, 403)
        if self.path.startswith("/lfs/"):
            return self._send(self.server.large[self.path.rpartition("/")[2]])
        api, name, rest = self._route()
        if name not in self.server.commits:
            return self._missing("Repo")
        verb, revision, *file = rest or ("revision", "main")
        entry = self.server.at(name, revision)
        if entry is None:
            return self._missing("Revision")
        commit, files = entry
        if api and verb == "tree":
            under = "".join(f"{part}/" for part in file)
            found = {path: content for path, content in files.items() if path.startswith(under)}
            return self._send(_entries(found)) if found else self._missing("Entry")
        if api:
            facts = {"id": name.removeprefix("datasets/"), "sha": commit, "siblings": [{"rfilename": k} for k in files]}
            return self._send(facts | {"tags": [], "downloads": 0, "likes": 0, "private": False})
        path = "/".join(file)
        if verb != "resolve" or path not in files:
            return self._missing("Entry")
        data, headers = files[path], {"X_Repo_Commit": commit}
        if (oid := hashlib.sha256(data).hexdigest()) in self.server.large:
            self.server.fetched.append((path, len(data)))
            location = (
                f"http://localhost:{self.server.server_address[1]}/lfs/{oid}"  # of another host, as the real one's
            )
            return self._send({}, 302, Location=location, X_Linked_Etag=f'"{oid}"', X_Linked_Size=len(data), **headers)
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data, status = data[int(match[1]) : int(match[2]) + 1], 206
        else:
            headers, status = headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, 200
        self.server.fetched.append((path, len(data)))
        return self._send(data, status, **headers)

    do_HEAD = do_GET  # noqa: N815


def _entries(files):
    return [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # as the variable of this name in the environment
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("XFUSION_CACHE", str(tmp_path / "cache"))
    shards._row_group.clear()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)
