"""The real `huggingface_hub` against a small server of its protocol on this machine."""

import hashlib
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="needs the extra `wan`"
)

ROOT = Path(__file__).parents[3]
NAME = "Wan-AI/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 2**16  # 16 MiB; the library writes 10 MiB at once
FILES = {
    "config.json": b'{"model_type": "t2v"}',
    "diffusion_pytorch_model.safetensors": LARGE,
    "models_t5_umt5-xxl-enc-bf16.pth": b"t5",
    "google/umt5-xxl/tokenizer.json": b"{}",
    "examples/large.mp4": b"not needed",
}
FETCH = """
import json, sys
from models.checkpoints.hub import HubError, find_checkpoint
cache, *names = sys.argv[1:]
results = []
for name in names:
    name, _, revision = name.partition("@")
    try:
        path = find_checkpoint(
            name,
            patterns=["config.json", "*.safetensors"],
            cache_dir=cache,
            revision=revision or None,
        )
        files = {f.name: f.stat().st_size for f in path.rglob("*.*")}
        results.append(files)
    except HubError as error:
        results.append(str(error))
print(json.dumps(results))
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves `FILES`; closes the connection once after `cut` bytes of a file."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cut: int | None = None
        self.ranges: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urlsplit(self.path).path
        if "/gated" in path:
            self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif NAME not in path:
            self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="none")
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self.reply(200, json.dumps([entry(name) for name in FILES]).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": NAME, "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(info).encode())
        else:
            self.send_file(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"))

    do_HEAD = do_GET  # noqa: N815

    def send_file(self, name):
        data = FILES[name]
        match = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        headers = {
            "ETag": f'"{digest(data)}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if match:
            self.server.ranges.append(f"{name} from {start}")
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.server.cut and data is LARGE:
            cut, self.server.cut = self.server.cut, None
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:cut])
            self.close_connection = True
            return
        self.reply(206 if match else 200, data[start:], **headers)


def digest(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name):
    data = FILES[name]
    return {"type": "file", "path": name, "size": len(data), "oid": digest(data)}


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub, cache, *names, **environ):
    """Files, or the error, of each name; and what was shown meanwhile."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        **environ,
    }
    done = subprocess.run(
        [sys.executable, "-c", FETCH, str(cache / "hub"), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_repositories(hub, tmp_path):
    """Only what is needed is fetched, once; what cannot be fetched is explained."""
    (files, nothing, gated), shown = fetch(
        hub, tmp_path, NAME, "nobody/nothing", "owner/gated"
    )
    assert files == {
        "config.json": len(FILES["config.json"]),
        "diffusion_pytorch_model.safetensors": len(LARGE),
    }
    assert "100%" in shown
    assert nothing.startswith("nobody/nothing is neither a folder here nor a repositor")
    assert gated.startswith("owner/gated wants its terms accepted first")
    (again, absent), _ = fetch(hub, tmp_path, NAME, "owner/absent", HF_HUB_OFFLINE="1")
    assert again == files
    assert "cannot be reached: check the network and HF_HUB_OFFLINE" in absent


def test_revisions_are_found_again_offline(hub, tmp_path):
    """By the name that they were fetched by, and by the commit it stood for."""
    (files,), _ = fetch(hub, tmp_path, f"{NAME}@v1")
    revisions = [f"{NAME}@{revision}" for revision in ("v1", COMMIT, "v2")]
    (named, commit, other), _ = fetch(hub, tmp_path, *revisions, HF_HUB_OFFLINE="1")
    assert named == commit == files
    assert "cannot be reached" in other


def test_an_interrupted_download_goes_on(hub, tmp_path):
    hub.cut = 12 * 2**20
    (result,), _ = fetch(hub, tmp_path, NAME)
    if isinstance(result, str):  # whether the library tries again itself differs
        assert "what has arrived is kept, run again to go on" in result
        (result,), _ = fetch(hub, tmp_path, NAME)
    assert result["diffusion_pytorch_model.safetensors"] == len(LARGE)
    (stored,) = tmp_path.rglob("diffusion_pytorch_model.safetensors")
    assert stored.read_bytes() == LARGE
    (resumed,) = hub.ranges
    assert int(resumed.split()[-1]) >= 10 * 2**20


def test_no_network_is_explained(hub, tmp_path):
    (nobody,), _ = fetch(hub, tmp_path, NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached: check the network and HF_HUB_OFFLINE" in nobody
