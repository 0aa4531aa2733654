"""Folders of other projects that have our packages' names.

Most cases run on stand-ins: folders that hold the file under test and empty modules,
so that a process starts in milliseconds. The last ones run on the packages themselves.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUR_MODULES = ("models/wan/config.py", "models/unet.py", "pallas_kernels/common.py")


def write(folder, *files):
    """Writes empty modules."""
    for name in files:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    return folder


@pytest.fixture
def ours(tmp_path):
    """A folder as pip would fill it, `models/theirs.py` not in it."""
    folder = write(tmp_path / "ours", *OUR_MODULES)
    write(folder, *(f"{name.split('/')[0]}/__init__.py" for name in OUR_MODULES))
    write(folder, "models/wan/__init__.py", "draft_jax/__init__.py")
    (folder / "draft_jax/__init__.py").write_text("from draft_jax import _shadowing\n")
    source = ROOT / "draft_jax/_shadowing.py"
    (folder / "draft_jax/_shadowing.py").write_text(source.read_text())
    return folder


def run(code, *folders, cwd=None):
    """Runs code with these folders first in sys.path; returns its last line.

    With -S no site-packages, so that an installation of ours is not found.
    """
    start = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n"
    command = [sys.executable, "-S", "-c", start + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


@pytest.mark.parametrize(
    "code",
    [
        "import draft_jax, models.wan.config",
        "import draft_jax; from models.wan.config import x",
        "import models, draft_jax; from models import wan",
    ],
    ids=["submodule", "from", "theirs first"],
)
def test_a_folder_that_hides_ours_is_named(ours, tmp_path, code):
    theirs = write(tmp_path / "theirs", "models/__init__.py", "models/theirs.py")
    told = run(code, theirs, ours)
    assert told == (
        f"ModuleNotFoundError: No module named 'models.wan' in {theirs}/models, which "
        f"hides {ours}/models, where it is. Rename {theirs}/models, or leave {theirs} "
        "out of sys.path: start Python in another folder or with -P, and look at "
        "PYTHONPATH."
    )


def test_the_working_folder_is_named(ours, tmp_path):
    theirs = write(tmp_path / "theirs", "models/__init__.py")
    told = run("import draft_jax, models.wan", "", ours, cwd=theirs)
    assert f"in {theirs}/models, which hides {ours}/models" in told


def test_a_hidden_dependency_of_draft_jax_is_named(ours, tmp_path):
    theirs = write(tmp_path / "theirs", "pallas_kernels/__init__.py")
    with (ours / "draft_jax/__init__.py").open("a") as stream:
        stream.write("import pallas_kernels.common\n")
    told = run("import draft_jax", theirs, ours)
    assert f"in {theirs}/pallas_kernels, which hides {ours}/pallas_kernels" in told


def test_a_folder_that_ours_hides_is_named(ours, tmp_path):
    """Python prefers our package to a folder without `__init__.py`."""
    theirs = write(tmp_path / "theirs", "models/theirs.py")
    told = run("import draft_jax, models.theirs", theirs, ours)
    assert told == (
        f"ModuleNotFoundError: No module named 'models.theirs' in {ours}/models, which "
        f"hides {theirs}/models, where it is. Rename {theirs}/models: draft_jax "
        "installs a package of this name."
    )


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_nothing_is_said_where_nothing_is_missed(ours, tmp_path, order):
    files = ("models/__init__.py", "models/unet.py", "models/theirs.py")
    theirs = write(tmp_path / "theirs", *files)
    folders = (theirs, ours) if order == "theirs first" else (ours, theirs)
    name = "theirs" if order == "theirs first" else "wan"
    code = (
        f"import draft_jax, models.unet, models.{name}; print(models.{name}.__name__)"
    )
    assert run(code, *folders) == f"models.{name}"


def test_what_nobody_has_is_told_as_ever(ours, tmp_path):
    theirs = write(tmp_path / "theirs", "models/__init__.py")
    for folders in ((theirs, ours), (ours, theirs), (ours,)):
        told = run("import draft_jax, models.absent", *folders)
        assert told == "ModuleNotFoundError: No module named 'models.absent'"
    told = run("import draft_jax, absent.module", theirs, ours)
    assert told == "ModuleNotFoundError: No module named 'absent'"


def test_a_link_to_our_folder_is_not_another(ours, tmp_path):
    (tmp_path / "link").symlink_to(ours)
    told = run("import draft_jax, models.absent", tmp_path / "link", ours)
    assert told == "ModuleNotFoundError: No module named 'models.absent'"


def test_packages_in_an_archive(ours, tmp_path):
    archive = tmp_path / "ours.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for file in ours.rglob("*.py"):
            stream.write(file, file.relative_to(ours))
    assert run("import draft_jax, models.wan; print('fine')", archive) == "fine"
    theirs = write(tmp_path / "theirs", "models/__init__.py")
    told = run("import draft_jax, models.wan", theirs, archive)
    assert f"in {theirs}/models, which hides {archive}/models" in told


def test_the_finder_is_put_in_once(ours):
    code = (
        "import draft_jax, importlib\n"
        "draft_jax._shadowing.install()\n"
        "names = [getattr(finder, '__name__', '') for finder in sys.meta_path]\n"
        "print(names.index('ShadowingFinder') - len(names), names.count('Shadowing"
        "Finder'))"
    )
    assert run(code, ours) == "-1 1"


@pytest.mark.nightly
def test_the_packages_themselves(tmp_path):
    theirs = write(tmp_path / "theirs", "models/__init__.py")
    code = (
        f"import sys; sys.path[:0] = [{str(theirs)!r}, {str(ROOT)!r}]\n"
        # An editable installation's own finder would find what is hidden.
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "import draft_jax, models.wan"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert f"in {theirs}/models, which hides {ROOT}/models" in done.stderr
