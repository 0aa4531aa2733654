"""The text encoders' process runs before JAX takes a GPU, whose memory both need."""

import json
import os
import subprocess
import sys

import pytest

from tests import hunyuan_folders
from tests.cases import mostly_nightly

# JAX_PLATFORMS names no platform, so the first use of JAX would be an error.
SCRIPT = """
import sys
import pytest
from models.hunyuan import loading, text_encoder
from models.cli import main
from tests import hunyuan_folders

def answer(request, **options):
    raise ChildProcessError("asked for " + ", ".join(request["prompts"]))

hunyuan_folders.use_tiny_sizes(pytest.MonkeyPatch())
text_encoder.run_worker = answer
# torch is there in this test, installed or not.
text_encoder.check_text_packages = loading.check_text_packages = lambda: None
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with what stands for text encoders."""
    root = tmp_path_factory.mktemp("hunyuan")
    folder = hunyuan_folders.write_folders(root)["diffusers"]
    for number, kind in (("", "llama"), ("_2", "clip_text_model")):
        encoder = folder / f"text_encoder{number}"
        tokenizer = folder / f"tokenizer{number}"
        encoder.mkdir()
        tokenizer.mkdir()
        (encoder / "config.json").write_text(json.dumps({"model_type": kind}))
        (encoder / "model.safetensors").write_bytes(b"")
        (tokenizer / "tokenizer.json").write_text("{}")
        (tokenizer / "merges.txt").write_text("")
    return folder


@pytest.mark.parametrize(
    "kind", mostly_nightly(("folder", "kept", "file", "float8"), ("file",))
)
def test_text_is_encoded_before_jax_is_used(folder, kind, tmp_path):
    checkpoint, more = folder, []
    if kind == "kept":
        more = ["--embeddings", tmp_path / "text"]
    if kind == "float8":  # another process looks at the device, and fails
        more = ["--linears", "float8"]
    if kind == "file":
        (checkpoint,) = (folder / "transformer").glob("*.safetensors")
        parts = ("vae", "text-encoder", "text-encoder-2", "tokenizer", "tokenizer-2")
        for part in parts:
            more += [f"--{part}", folder / part.replace("-", "_")]
    arguments = ["generate", "a cat", "--checkpoint", checkpoint, "--size", "48x32"]
    arguments += ["--frames", "5", "--output", tmp_path / "out", *more]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "asked for a cat" in done.stderr.splitlines()[-1]
