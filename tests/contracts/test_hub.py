"""A pack on a hub: pushed in one commit, loaded by its id, pinned by revision; the card says what was recorded."""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from contracts.table import make_model
from huggingface_hub import ModelCard, constants

import xfusion
from xfusion import checkpoint
from xfusion.apps import cli
from xfusion.data.sequence import XFusionError
from xfusion.opening import Opening


class Hub(ThreadingHTTPServer):
    """What the hub client asks of a hub, in memory: repositories as lists of commits, each a dictionary of files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}

    def files(self, name, revision):
        commits = self.commits.get(name, [])
        found = [c for c in commits if c[0] == revision]
        return found[0] if found else commits[-1] if revision == "main" and commits else None


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

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.commits.setdefault(name, [("0" * 40, {".gitattributes": b""})])
            return self._send({"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        name, verb = "/".join(path.split("/")[3:5]), path.split("/")[5]
        if verb == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._send({"files": files})
        commits = self.server.commits[name]
        files = dict(commits[-1][1]) if commits else {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body).hexdigest()
        commits.append((oid, files))
        return self._send({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid,
                           "hookOutput": ""})  # fmt: skip

    def do_GET(self):
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, verb, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            found = self.server.files(name, revision)
            if found is None:
                return self._send({"error": "not found"}, 404, X_Error_Code="RevisionNotFound")
            sha, files = found
            if verb == "tree":
                return self._send([{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                                   for k, v in files.items()])  # fmt: skip
            return self._send({"id": name, "sha": sha, "siblings": [{"rfilename": k} for k in files], "tags": [],
                               "downloads": 0, "likes": 0, "private": False})  # fmt: skip
        if len(parts) < 5 or parts[2] != "resolve":
            return self._send({"error": "not found"}, 404)
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = self.server.files(name, revision)
        if found is None or file not in found[1]:
            return self._send({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        data = found[1][file]
        return self._send(data, X_Repo_Commit=found[0], ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        with contextlib.suppress(AttributeError):
            monkeypatch.setattr(constants, name, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_pack_goes_to_the_hub_and_comes_back(bases, hub, tmp_path, capsys):
    model = make_model(bases["llama"])
    model.opening = Opening(64)
    model.save_pretrained(tmp_path / "one", training={"data": "emoji", "data_licence": "CC-BY-SA-4.0"})
    assert cli.main(["push", str(tmp_path / "one"), "org/one", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["commit"].rpartition("/")[2]
    assert set(hub.commits["org/one"][1][1]) == {".gitattributes", *checkpoint.FILES}
    loaded = xfusion.load("org/one", backbone=bases["llama"])
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.opening.opens.weight, model.opening.opens.weight)

    # Another one behind it, without a head: its file goes. The first one can still be named by its commit.
    other = make_model(bases["llama"], "dual tower, strided")
    assert other.push_to_hub("org/one", message="smaller").startswith(hub.address)
    assert len(hub.commits["org/one"]) == 3 and checkpoint.OPENING not in hub.commits["org/one"][2][1]
    newest = xfusion.load("org/one", backbone=bases["llama"])
    assert newest.fingerprint == other.fingerprint and newest.opening is None
    assert xfusion.load(f"org/one@{first}", backbone=bases["llama"]).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match="belongs to the base"):
        xfusion.load("org/one", backbone=bases["qwen3"])
    with pytest.raises(XFusionError, match="hub pack .* cannot be fetched|cannot be fetched"):
        xfusion.load("org/none")


def test_an_altered_pack_does_not_leave(bases, hub, tmp_path):
    make_model(bases["llama"], "low-rank tower").save_pretrained(tmp_path / "pack")
    path = tmp_path / "pack" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(XFusionError, match="was altered"):
        checkpoint.push(tmp_path / "pack", "org/pack")
    assert not hub.commits
    assert cli.main(["push", str(tmp_path / "pack"), "no-repository"]) == 2


def test_the_card_says_what_was_recorded_and_no_more(bases, tmp_path):
    model = make_model(bases["llama"])
    model.save_pretrained(tmp_path / "bare")
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "Not measured." in bare and "No proof is recorded" in bare and "| data | not recorded |" in bare
    scores = {"fit_caption_exact": 0.98765, "settings": {"suite": "emoji", "seed": 0, "versions": {"torch": "2.13.0"}}}
    training = {"data": "emoji", "data_licence": "CC-BY-SA-4.0", "runs": [{"command": "xfusion train xfusion"}]}
    assert "license" not in ModelCard(bare).data.to_dict() and "| these weights | not recorded |" in bare
    model.save_pretrained(tmp_path / "full", scores=scores, training=training, licence="cc-by-sa-4.0")
    proof = {"text_identical": True, "settings": {"dtype": "float32", "device": "cpu"}}
    checkpoint.add_facts(tmp_path / "full", model, proof=proof)
    text = (tmp_path / "full" / "README.md").read_text()
    for part in ("| fit_caption_exact | 0.9877 |", "suite emoji, seed 0; torch 2.13.0", "| data | CC-BY-SA-4.0 |",
                 "| run 1 | `xfusion train xfusion` |", "bit for bit the base's", bases["llama"].fingerprint,
                 "| codec | none needed |", "Regime: strictly frozen. Text alone comes out as the base's"):  # fmt: skip
        assert part in text, part
    assert ModelCard(text).data.to_dict()["license"] == "cc-by-sa-4.0"
    assert xfusion.load(tmp_path / "full", backbone=bases["llama"]).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match="holds other weights"):
        checkpoint.add_facts(tmp_path / "full", make_model(bases["llama"], "low-rank tower"), proof=proof)
