"""Compiled programs that later runs of the command line use again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import pytest

from models.cli import compile_cache as under_test
from models.cli import main
from models.cli.compile_cache import cache_folder, compile_cache
from tests.wan_folders import TEXT_TO_VIDEO

ROOT = Path(__file__).parents[3]
# Runs the command and counts what JAX compiles, and what it takes from the cache.
COUNTING = """
import collections, json, sys
import jax
counts = collections.Counter()
listen = lambda event, *_, **__: counts.update([event])
jax.monitoring.register_event_listener(listen)
jax.monitoring.register_event_duration_secs_listener(listen)
from models.cli import main
status = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(status)
"""
HITS = "/jax/compilation_cache/cache_hits"
PROGRAMS = "/jax/core/compile/backend_compile_duration"  # read or compiled
SHIPPED = ["a red ball", "--size", "32x32", "--frames", "3", "--steps", "1"]
SHIPPED += ["--dense-fraction", "0"]
WAN = ["a cat", "--checkpoint", str(TEXT_TO_VIDEO), "--size", "48x32", "--frames", "5"]
ONE_STEP_EACH = ["--steps", "2", "--dense-fraction", "0.5"]


def counts_of_run(arguments, *, cache, folder, **environment):
    """Runs the command in a process and folder of its own."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, "generate", *arguments, "--output", "out"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(cache),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
@pytest.mark.parametrize(
    "arguments",
    [SHIPPED, [*WAN, *ONE_STEP_EACH], ["a red ball", *ONE_STEP_EACH]],
    ids=["shipped", "wan", "whole"],
)
def test_a_second_process_compiles_nothing(tmp_path, arguments):
    """Also not where sets have another order: keys are the program's alone."""
    cache = tmp_path / "cache"
    first, second = (
        counts_of_run(
            arguments, cache=cache, folder=tmp_path / name, PYTHONHASHSEED=seed
        )
        for name, seed in (("first", "1"), ("second", "2"))
    )
    assert first[PROGRAMS] - first.get(HITS, 0) > 50
    assert second[PROGRAMS] - second[HITS] == 0
    assert second[PROGRAMS] == first[PROGRAMS]
    videos = [tmp_path / name / "out" / "video.mp4" for name in ("first", "second")]
    assert videos[0].read_bytes() == videos[1].read_bytes()


# --------------------------------------------------------------- in this process


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def their_cache(tmp_path):
    """The folder that a user has set."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    yield tmp_path / "theirs"
    jax.config.update("jax_compilation_cache_dir", None)


def compile_program(number):
    """Compiles what JAX has not compiled before in this process, for each number."""
    return jax.jit(lambda x: jnp.sin(x) + number)(jnp.zeros(3))


def entries(folder):
    return sorted(folder.glob("*-cache")) if folder.exists() else []


def test_the_library_leaves_the_cache_alone():
    import models.loading  # noqa: F401

    assert jax.config.jax_compilation_cache_dir is None


def test_the_cache_is_bounded_and_ends_with_the_command(user_cache, monkeypatch):
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    with compile_cache():
        compile_program(0.25)
        inside = [getattr(jax.config, name) for name in names]
        size = max(file.stat().st_size for file in entries(cache_folder()))
    assert inside == [str(cache_folder()), 2 * 2**30, 0.0, 0]
    assert cache_folder().is_relative_to(user_cache / "draft-video")
    assert cache_folder().stat().st_mode & 0o077 == 0, "others could plant programs"
    assert [getattr(jax.config, name) for name in names] == before

    most = 4 * size
    monkeypatch.setattr(under_test, "MOST_BYTES", most)
    with compile_cache():
        for number in range(12):
            compile_program(0.5 + number)
    kept = [file.stat().st_size for file in entries(cache_folder())]
    assert 0 < sum(kept) <= most
    count = len(kept)
    compile_program(0.125)
    assert len(entries(cache_folder())) == count, "outside of the command nothing"


def test_no_cache_on_request(user_cache, their_cache):
    with compile_cache(enabled=False):
        compile_program(0.375)
    assert not user_cache.exists()
    assert not their_cache.exists()


@pytest.mark.parametrize("flags", [[], ["--no-compile-cache"]], ids=["on", "off"])
def test_the_command_line_decides(user_cache, monkeypatch, flags):
    seen = []

    def note(arguments):
        seen.append(jax.config.jax_enable_compilation_cache)
        raise ValueError("noted")

    monkeypatch.setattr("models.cli.generate.read_request", note)
    assert main(["generate", "a cat", *flags]) == 2
    assert seen == [not flags]
    assert jax.config.jax_enable_compilation_cache
    assert cache_folder().exists() == (not flags)


def test_a_cache_that_the_user_has_set_is_taken(user_cache, their_cache, monkeypatch):
    def settings():
        return (
            jax.config.jax_compilation_cache_dir,
            jax.config.jax_compilation_cache_max_size,
            jax.config.jax_persistent_cache_min_compile_time_secs,
        )

    _, size, seconds = settings()
    with compile_cache():
        compile_program(0.625)
        assert settings() == (str(their_cache), size, 0.0)
    assert entries(their_cache)
    assert not user_cache.exists()
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(seconds))
    with compile_cache():
        assert settings() == (str(their_cache), size, seconds)


def test_a_folder_that_cannot_be_made_is_a_note(user_cache, capsys):
    user_cache.write_text("a file")
    with compile_cache():
        compile_program(0.75)
    shown = capsys.readouterr().err
    assert shown.startswith("draft-video: note: compiled programs are not kept: ")
    assert str(user_cache) in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_written_to_is_a_note(monkeypatch, capsys):
    """/proc cannot be written to even by root."""
    monkeypatch.setattr(under_test, "cache_folder", lambda: Path("/proc/self"))
    with compile_cache():
        compile_program(0.875)
    shown = capsys.readouterr().err
    assert "note: compiled programs are not kept: /proc/self cannot be used" in shown
    assert shown.count("\n") == 1


def test_a_damaged_cache_is_told_once_and_then_removed(user_cache, capsys):
    with compile_cache():
        compile_program(1.25)
        compile_program(1.75)
    assert len(entries(cache_folder())) >= 2
    for file in entries(cache_folder()):
        file.write_bytes(file.read_bytes()[:20])  # as a full disk or a kill leaves it
    capsys.readouterr()
    jax.clear_caches()
    with compile_cache():
        assert compile_program(1.25)[0] == 1.25
        assert compile_program(1.75)[0] == 1.75
    shown = capsys.readouterr().err
    assert shown.startswith("draft-video: note: Error reading persistent compilation")
    assert f"(in {cache_folder()}; --no-compile-cache does without)" in shown
    assert shown.count("\n") == 1
    assert not cache_folder().exists()


def test_a_cache_that_others_lock_for_long_stays(user_cache, capsys, monkeypatch):
    with compile_cache():
        compile_program(2.25)
    kept = entries(cache_folder())
    jax.clear_caches()

    def wait(self, *_, **__):
        raise filelock.Timeout(self.lock_file)

    capsys.readouterr()
    with compile_cache():
        monkeypatch.setattr(filelock.BaseFileLock, "acquire", wait)
        assert compile_program(2.25)[0] == 2.25
    assert "Timeout" in capsys.readouterr().err
    assert entries(cache_folder()) == kept


# ------------------------------------------------------------------- which folder


@pytest.mark.parametrize(
    ("system", "variable", "value", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "/caches", "/caches"),
        ("linux", "XDG_CACHE_HOME", "relative", "/home/me/.cache"),
        ("linux", "XDG_CACHE_HOME", "", "/home/me/.cache"),
        ("darwin", "XDG_CACHE_HOME", "/caches", "/home/me/Library/Caches"),
        ("win32", "LOCALAPPDATA", "/local", "/local"),
        ("win32", "LOCALAPPDATA", "", "/home/me/AppData/Local"),
    ],
)
def test_the_system_says_where_caches_are(
    monkeypatch, system, variable, value, expected
):
    monkeypatch.setattr(under_test.sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setenv(variable, value)
    assert cache_folder().parents[1] == Path(expected) / "draft-video"


def test_machines_with_other_instructions_share_no_folder(monkeypatch):
    """JAX's key holds little of a CPU; a home folder may serve many machines."""
    folders = set()
    for flags in ("fma avx2", "fma avx2 avx512f"):
        text = f"processor : 0\nflags : {flags}\nprocessor : 1\nflags : {flags}\n"
        monkeypatch.setattr(Path, "is_file", lambda self: True)
        monkeypatch.setattr(Path, "read_text", lambda self, text=text, **_: text)
        folders.add(cache_folder())
        folders.add(cache_folder())
    assert len(folders) == 2


def test_tests_do_not_write_to_the_users_cache():
    assert "draft-video-tests-" in str(cache_folder())
