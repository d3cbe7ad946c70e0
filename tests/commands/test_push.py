"""A student goes to a stand-in for the hub on 127.0.0.1 and comes back; what goes wrong is one sentence."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import pcdistill
from pcdistill import report
from pcdistill.commands.push import push
from pcdistill.errors import InputError
from tests.commands.folders import finished_run
from tests.processes import PATIENCE

SOURCE = str(Path(pcdistill.__file__).parents[1])
SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as an upload of small files and a snapshot take."""

    def log_message(self, *_):
        pass

    def answer(self, status, tree=None, *, body=b"", headers=None):
        body = json.dumps(tree).encode() if tree is not None else body
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        base = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{base}/me/student", "name": "me/student"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [one["path"] for one in json.loads(sent)["files"]]
            return self.answer(200, {"files": [_regular(path) for path in files]})
        if "/commit/" in self.path:
            for line in sent.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self.answer(200, {"commitUrl": f"{base}/me/student/commit/{SHA}", "commitOid": SHA})
        return self.answer(500, {"error": f"unexpected {self.path}"})

    def do_GET(self):
        found = re.fullmatch(r"/me/student/resolve/[^/]+/(.*)", self.path.partition("?")[0])
        if found and found[1] in self.server.files:
            body = self.server.files[found[1]]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": SHA}
            return self.answer(200, body=body, headers=headers)
        if re.match(r"/api/models/me/student(/revision/[^/]+)?$", self.path.partition("?")[0]):
            names = [{"rfilename": name} for name in self.server.files]
            return self.answer(200, {"id": "me/student", "modelId": "me/student", "sha": SHA, "siblings": names})
        if self.path.startswith("/api/models/me/student/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in self.server.files.items()
            ]
            return self.answer(200, tree)
        return self.answer(404, {"error": "not found"}, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET


def _regular(path):
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None}


@contextmanager
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def call(tmp_path, argv, port, **more):
    """A process whose hub is the stand-in: its address is read when huggingface_hub is imported."""
    env = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    env |= {"PYTHONPATH": SOURCE, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"), **more}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, *argv], env=env, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


@pytest.mark.slow
def test_a_student_goes_to_the_hub_and_comes_back(tmp_path):
    pytest.importorskip("huggingface_hub")
    run = tmp_path / "run"
    student, _ = finished_run(run, "timm/test_resnet", image_size=32, data="digits")
    (run / "README.md").write_text(report.write_model_card(run), encoding="utf-8")
    (run / "last.pt").write_bytes(b"a checkpoint stays at home")
    with hub() as server:
        port = server.server_port
        done = call(tmp_path, ["-m", "pcdistill.cli", "push", str(run), "me/student"], port, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "pushed 5 files" in done.stdout
        assert set(server.files) == {
            "README.md", "config.json", "model.safetensors", "recipe.yaml", "student.safetensors",
        }  # fmt: skip
        assert server.files["model.safetensors"] == (run / "student.safetensors").read_bytes()
        images = torch.randn(3, 1, 32, 32)
        torch.save(images, tmp_path / "images.pt")
        with torch.no_grad():
            wanted = student(images)
        code = (
            "import sys, torch, pcdistill, timm\n"
            "images = torch.load(sys.argv[1])\n"
            "student = pcdistill.load_student('me/student')\n"
            "hub = timm.create_model('hf-hub:me/student', pretrained=True).eval()\n"
            "with torch.no_grad():\n"
            "    torch.save([student.model(images), hub(images), student.classes], sys.argv[2])\n"
        )
        done = call(tmp_path, ["-c", code, str(tmp_path / "images.pt"), str(tmp_path / "out.pt")], port)
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs, classes = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(theirs, wanted)
    assert classes == [str(digit) for digit in range(10)]


@pytest.mark.slow
def test_without_a_token_a_network_or_a_repository_one_sentence_says_so(tmp_path):
    pytest.importorskip("huggingface_hub")
    run = tmp_path / "run"
    finished_run(run, "cifar/resnet8")
    pushing = ["-m", "pcdistill.cli", "push", str(run), "me/student"]
    with hub() as server:
        port = server.server_port
        for argv, env, code, sentence in (
            (pushing, {}, 2, "the hub refuses me/student: there is no token; log in with: hf auth login"),
            (pushing, {"HF_TOKEN": "hf_other"}, 2, "your token does not allow it"),
            (pushing, {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, 1, "HF_HUB_OFFLINE is set"),
            (pushing, {"HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "cannot be reached for me/student"),
        ):
            done = call(tmp_path, argv, port, **env)
            assert done.returncode == code, done.stderr[-2000:]
            assert sentence in done.stderr
            assert "Traceback" not in done.stderr
        load = "import pcdistill; pcdistill.load_student('me/nothing')"
        done = call(tmp_path, ["-c", load], port)
        assert "InputError: the hub has no me/nothing" in done.stderr


def test_a_folder_is_loaded_without_the_hub(tmp_path):
    student, _ = finished_run(tmp_path, "cifar/resnet8")
    found = pcdistill.load_student(tmp_path)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), student(images))
    assert found.classes == [str(digit) for digit in range(10)]


def test_a_name_that_is_neither_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="neither a run's folder nor a name on the hub"):
        pcdistill.load_student(str(tmp_path / "nowhere"))
    finished_run(tmp_path / "run", "cifar/resnet8")
    with pytest.raises(InputError, match='"a/b/c" is no name on the hub'):
        push(tmp_path / "run", "a/b/c")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"load me/student needs huggingface_hub, .*pip install 'pcdistill\[hub\]'"):
        pcdistill.load_student("me/student")
