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

ROOT = Path(__file__).parents[2]
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
from models.hub import HubError, find_checkpoint
try:
    path = find_checkpoint(
        sys.argv[1], patterns=json.loads(sys.argv[3]), cache_dir=sys.argv[2]
    )
    files = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*.*")}
    print(json.dumps({"files": files}))
except HubError as error:
    print(json.dumps({"error": str(error)}))
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


def fetch(hub, cache, name=NAME, patterns=("config.json", "*.safetensors"), **environ):
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        **environ,
    }
    done = subprocess.run(
        [sys.executable, "-c", FETCH, name, str(cache / "hub"), json.dumps(patterns)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"progress": done.stderr}


def test_only_what_is_needed_is_fetched_and_kept(hub, tmp_path):
    first = fetch(hub, tmp_path)
    assert first["files"] == {
        "config.json": len(FILES["config.json"]),
        "diffusion_pytorch_model.safetensors": len(LARGE),
    }
    assert "100%" in first["progress"]
    hub.shutdown()  # the next time nothing is fetched
    offline = fetch(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["files"] == first["files"]


def test_an_interrupted_download_goes_on(hub, tmp_path):
    hub.cut = 12 * 2**20
    result = fetch(hub, tmp_path)
    if "error" in result:  # whether the library tries again by itself differs
        assert "what has arrived is kept, run again to go on" in result["error"]
        result = fetch(hub, tmp_path)
    assert result["files"]["diffusion_pytorch_model.safetensors"] == len(LARGE)
    (stored,) = tmp_path.rglob("diffusion_pytorch_model.safetensors")
    assert stored.read_bytes() == LARGE
    (resumed,) = hub.ranges
    assert int(resumed.split()[-1]) >= 10 * 2**20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "nobody/nothing is neither a folder here nor a repository"),
        ("owner/gated", "owner/gated wants its terms accepted first"),
    ],
)
def test_refusals_are_explained(hub, tmp_path, name, message):
    assert message in fetch(hub, tmp_path, name)["error"]


def test_no_network_is_explained(hub, tmp_path):
    message = "cannot be reached: check the network and HF_HUB_OFFLINE"
    assert message in fetch(hub, tmp_path, HF_HUB_OFFLINE="1")["error"]
    nobody = fetch(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert message in nobody["error"]
