"""Names of outputs, what is refused about them, and files that outlive a failure."""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from models.cli import generate as generate_command
from models.cli import main, outputs
from models.cli.messages import EXIT_BAD_INPUT, EXIT_INCOMPLETE, one_line
from models.cli.options import sampling_from
from models.cli.parser import build_parser
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import GenerationResult
from models.media import plots
from models.media import video as video_io
from models.wan.loading import describe_wan
from tests import tiny_model

PROMPT = "a red ball"
SMALL = ("--size", "48x32", "--frames", "3", "--steps", "4")
DRAFT_FILES = {"video.mp4", "kept_share.png", "report.json", "report.html"}

# -------------------------------------------------------------------------- names


def name_of(*arguments: str) -> str:
    parsed = build_parser().parse_args(arguments)
    parsed.argv = list(arguments)
    return outputs.run_name(parsed, sampling_from(parsed))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Blue   SEA!", "blue-sea"),
        ("红色的球", "红色的球"),
        ("Красный шар, 2 м", "красный-шар-2-м"),
        ("लाल गेंद", "लाल-गेंद"),  # vowel signs are marks, not letters
        ("cafe\u0301", "caf\u00e9"),
        ("a ❤️ ball", "a-ball"),  # its second code point is a mark
        ("❤️ 🎈", "video"),
        ("../../etc/passwd", "etc-passwd"),
        ("con", "con"),
    ],
)
def test_words_keep_the_letters_of_every_script(prompt, words):
    assert outputs.words_of(prompt) == words


@pytest.mark.parametrize("letter", ["a", "é", "球", "𠀋"])
def test_long_prompts_give_names_that_file_systems_take(letter):
    name = name_of("generate", letter * 1000)
    assert len(f"{name}-step49.png".encode()) <= 255
    assert set(name.split("-")[0]) == {letter}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("红色的球", "蓝色的球"),
        ("🎈", "🎉"),
        ("a" * 200 + "b", "a" * 200 + "c"),
        ("a ball", "A  ball"),
    ],
)
def test_prompts_do_not_share_a_name_on_any_file_system(one, other):
    names = name_of("generate", one).casefold(), name_of("generate", other).casefold()
    assert names[0] != names[1]


# Each option that changes what is written, with a value other than the default.
WITH_EFFECT = {
    "--embedded-guidance": ["6"],
    "--preset": ["published"],
    "--cache": ["easy"],
    "--speed": ["fast"],
    "--cache-ratios": ["x"],
    "--text-encoder-2": ["x"],
    "--tokenizer-2": ["x"],
    "--checkpoint": ["folder"],
    "--lora": ["file.safetensors"],
    "--lora-strict": ["no"],
    "--image": ["cat.png"],
    "--image-fit": ["crop"],
    "--embeddings": ["folder"],
    "--text-device": ["cpu"],
    "--vae-tile": ["256"],
    "--vae-dtype": ["bfloat16"],
    "--linears": ["auto"],
    "--method": ["paper"],
    "--mesh": ["guidance=2"],
    "--shard-weights": ["--mesh", "guidance=2"],
    "--boundary": ["800"],
    "--low-guidance": ["3"],
    "--low-sparsity": ["0.6"],
    "--low-dense-fraction": ["0.4"],
    "--low-dense-layers": ["3"],
    "--fps": ["5"],
    "--dense": [],
    "--compare": [],
    "--seed": ["1"],
    "--steps": ["3"],
    "--size": ["48x32"],
    "--frames": ["4"],
    "--guidance": ["2"],
    "--shift": ["2"],
    "--solver": ["unipc"],
    "--grid": ["diffusers"],
    "--negative-prompt": ["blur"],
    "--guidance-batching": ["two_calls"],
    "--sparsity": ["0.5"],
    "--selection": ["top_p"],
    "--pooling": ["mean+max"],
    "--edge-tiles": ["as_published"],
    "--draft-tile": ["4x4"],
    "--means": ["2x2"],
    "--mean-frames": ["2", "--means", "2x2"],
    "--correction": ["64"],
    "--ranking": ["spread", "--means", "2x2"],
    "--top-p": ["0.5"],
    "--dense-fraction": ["0.5"],
    "--dense-layers": ["2"],
    "--mask-refresh": ["2"],
    "--vae": ["vae.safetensors"],
    "--text-encoder": ["encoder.safetensors"],
    "--image-encoder": ["encoder.safetensors"],
    "--tokenizer": ["tokenizer.json"],
    "--revision": ["main"],
}
WITHOUT_EFFECT = {
    "--output": ["folder"],
    "--overwrite": [],
    "--no-compile-cache": [],
    "--debug": [],
}


def flags_of_generate() -> set[str]:
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    actions = commands.choices["generate"]._actions
    flags = {flag for action in actions for flag in action.option_strings}
    return flags - {"-h", "--help"}


def test_each_option_with_an_effect_is_in_the_name():
    flags = flags_of_generate()
    assert not flags - WITH_EFFECT.keys() - WITHOUT_EFFECT.keys()
    solver = ["--solver", "euler"]
    plain = name_of("generate", PROMPT, *solver)
    names = [
        name_of("generate", PROMPT, *solver, flag, *WITH_EFFECT[flag])
        for flag in sorted(flags & WITH_EFFECT.keys())
    ]
    assert len({plain, *names}) == 1 + len(names)
    for flag, value in WITHOUT_EFFECT.items():
        assert name_of("generate", PROMPT, *solver, flag, *value) == plain
    assert name_of("generate", PROMPT) == plain, "the default said is the default"
    assert name_of("generate", PROMPT, *solver, "--correction", "256") == plain


def test_the_strength_of_an_adapter_is_in_the_name():
    weak, strong, both = (
        name_of("generate", PROMPT, *(part for lora in loras for part in lora))
        for loras in (
            [("--lora", "x:0.5")],
            [("--lora", "x:1")],
            [("--lora", "x:1"), ("--lora", "y:1")],
        )
    )
    assert len({weak, strong, both}) == 3


# ------------------------------------------------------------ refused before a step


@pytest.fixture
def no_model(monkeypatch):
    """Makes it an error to load a model."""

    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("models.cli.model.load_pipeline", load)


def refuse(capsys, *arguments: str) -> str:
    """Runs a command that must fail, and returns its line."""
    assert main(list(arguments)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def link_to_nothing(folder: Path) -> tuple[Path, str]:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link" / "below", f"{folder / 'link'} is a link to"


def file_that_is_a_folder(folder: Path) -> tuple[Path, str]:
    (folder / "run" / "video.mp4").mkdir(parents=True)
    return folder / "run", f"{folder / 'run' / 'video.mp4'} is a folder"


def long_name(folder: Path) -> tuple[Path, str]:
    return folder / ("球" * 100) / "below", "has 300 bytes; a name may have 255"


def earlier_run(folder: Path) -> tuple[Path, str]:
    (folder / "report.json").write_text("{}")
    (folder / "dense.mp4").write_bytes(b"")
    return folder, "an earlier run has left dense.mp4 and report.json there"


@pytest.mark.parametrize(
    "make", [link_to_nothing, file_that_is_a_folder, long_name, earlier_run]
)
def test_a_folder_that_cannot_take_the_run_is_refused(make, tmp_path, capsys, no_model):
    path, message = make(tmp_path)
    error = refuse(capsys, "generate", PROMPT, *SMALL, "--output", str(path))
    assert message in error
    if make is not earlier_run:  # --overwrite is about files of runs only
        options = ("--overwrite", "--output", str(path))
        assert message in refuse(capsys, "generate", PROMPT, *SMALL, *options)


def dangling_picture(folder: Path) -> tuple[Path, str]:
    (folder / "a.png").symlink_to("gone")
    return folder / "a.png", "is a link to gone, which does not exist"


def earlier_picture(folder: Path) -> tuple[Path, str]:
    (folder / "a.png").write_bytes(b"")
    return folder / "a.png", "exists; --overwrite replaces it"


def long_picture(folder: Path) -> tuple[Path, str]:
    return folder / f"{'a' * 252}.png", "has 256 bytes; a name may have 255"


@pytest.mark.parametrize("make", [dangling_picture, earlier_picture, long_picture])
def test_a_picture_that_cannot_be_written_is_refused(make, tmp_path, capsys, no_model):
    path, message = make(tmp_path)
    command = ("inspect", PROMPT, *SMALL, "--output", str(path))
    assert message in refuse(capsys, *command)


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_second_run_is_refused_by_its_default_name(
    command, tmp_path, capsys, no_model, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = name_of(command, PROMPT, *SMALL)
    if command == "generate":
        earlier = tmp_path / "outputs" / name / "video.mp4"
    else:
        earlier = tmp_path / "outputs" / f"{name}-step2.png"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"earlier")
    assert "--overwrite replaces" in refuse(capsys, command, PROMPT, *SMALL)
    assert earlier.read_bytes() == b"earlier"


@pytest.mark.parametrize(
    "arguments", [("a \udcff ball",), (PROMPT, "--negative-prompt", "\udcff")]
)
def test_what_is_not_text_is_refused(arguments, tmp_path, capsys, no_model):
    folder = str(tmp_path / "out")
    error = refuse(capsys, "generate", *arguments, *SMALL, "--output", folder)
    assert "cannot be written as UTF-8" in error


@pytest.mark.parametrize("ffmpeg", ["/nowhere/ffmpeg", "/bin/false"])
def test_an_ffmpeg_that_writes_nothing_is_refused(
    ffmpeg, tmp_path, capsys, no_model, monkeypatch
):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg)
    folder = str(tmp_path / "out")
    error = refuse(capsys, "generate", PROMPT, *SMALL, "--output", folder)
    assert "videos need an ffmpeg with libx264" in error


def test_a_package_that_prompts_need_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="needs the package ftfy; install it with"):
        describe_wan(tmp_path / "absent")


# --------------------------------------------------- what was computed is not lost


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_model.save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def computed(monkeypatch):
    """Stands for the model's work: a grey video at once, whatever the request."""

    def generate(self, prompts, sampling, *, attention, **_):
        steps, layers = sampling.num_steps, 3
        kept = np.full((steps, layers), 1.0 if attention.is_dense else 0.5)
        shape = (1, sampling.frames, sampling.height, sampling.width, 3)
        return GenerationResult(
            video=np.full(shape, 0.5, np.float32),
            latents=np.zeros((1, 1, 2, 2, 3), np.float32),
            time_ms=np.full(steps, 2.0),
            compile_ms=1.0,
            decode_ms=1.0,
            kept_density=kept,
            dense=kept == 1.0,
            timesteps=np.linspace(1000.0, 250.0, steps),
        )

    monkeypatch.setattr(VideoPipeline, "generate", generate)
    return generate


def generate(checkpoint: str, folder: Path, *arguments: str, prompt=PROMPT) -> int:
    command = ["generate", prompt, "--checkpoint", checkpoint, *SMALL, *arguments]
    return main([*command, "--output", str(folder)])


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def fail(*_, **__):
    raise RuntimeError("no ink")


@pytest.mark.parametrize(
    ("module", "function", "missing"),
    [
        (plots, "plot_kept_share", "kept_share.png"),
        (video_io, "write_json", "report.json"),
        (video_io, "write_mp4", "video.mp4"),
        (generate_command, "write_report", "report.html"),
    ],
)
def test_a_file_that_fails_costs_no_other(
    module, function, missing, checkpoint, computed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(module, function, fail)
    assert generate(checkpoint, tmp_path) == EXIT_INCOMPLETE
    captured = capsys.readouterr()
    assert names_in(tmp_path) == DRAFT_FILES - {missing}
    assert f"{tmp_path / missing} (RuntimeError: no ink) is missing" in captured.err
    printed = captured.out.splitlines()
    assert {str(tmp_path / name) for name in names_in(tmp_path)} <= set(printed)


def test_a_failing_measure_costs_the_reports_alone(
    checkpoint, computed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("models.diffusion.comparison.ssim", fail)
    assert generate(checkpoint, tmp_path, "--compare") == EXIT_INCOMPLETE
    videos = {"dense.mp4", "sparse.mp4", "side_by_side.mp4"}
    assert names_in(tmp_path) == videos | {"kept_share.png"}
    captured = capsys.readouterr()
    missing = " and ".join(
        f"{tmp_path / name} (RuntimeError: no ink)"
        for name in ("report.json", "report.html")
    )
    assert f"{missing} are missing" in captured.err
    assert [line.split(":")[0] for line in captured.out.splitlines()] == [
        "dense",
        "sparse",
        *(str(tmp_path / name) for name in ("dense.mp4", "sparse.mp4")),
        *(str(tmp_path / name) for name in ("side_by_side.mp4", "kept_share.png")),
    ]


def test_details_of_the_report_are_there_before_the_model(
    tmp_path, monkeypatch, no_model
):
    monkeypatch.setattr("models.cli.model.run_details", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        main(["generate", PROMPT, *SMALL, "--output", str(tmp_path / "out")])


def test_a_sparse_run_that_fails_does_not_cost_the_dense_video(
    checkpoint, computed, tmp_path, capsys, monkeypatch
):
    def generate_dense(self, *arguments, attention, **options):
        if not attention.is_dense:
            raise MemoryError("too little memory")
        return computed(self, *arguments, attention=attention, **options)

    monkeypatch.setattr(VideoPipeline, "generate", generate_dense)
    assert generate(checkpoint, tmp_path, "--compare") == EXIT_BAD_INPUT
    captured = capsys.readouterr()
    assert names_in(tmp_path) == {"dense.mp4"}
    assert captured.out.splitlines() == [str(tmp_path / "dense.mp4")]
    assert "too little memory" in captured.err


def test_another_kind_of_run_leaves_no_file_of_the_earlier(
    checkpoint, computed, tmp_path
):
    (tmp_path / "notes.txt").write_text("mine")
    kinds = {
        "--compare": {"dense.mp4", "sparse.mp4", "side_by_side.mp4"}
        | (DRAFT_FILES - {"video.mp4"}),
        "--dense": {"video.mp4", "report.json", "report.html"},
        "--fps=3": DRAFT_FILES,
    }
    for option, files in kinds.items():
        assert generate(checkpoint, tmp_path, "--overwrite", option) == 0
        assert names_in(tmp_path) == files | {"notes.txt"}


def test_no_old_picture_or_report_stays_where_the_new_one_fails(
    checkpoint, computed, tmp_path, monkeypatch
):
    for name in DRAFT_FILES:
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(plots, "plot_kept_share", fail)
    monkeypatch.setattr(video_io, "write_json", fail)
    monkeypatch.setattr(generate_command, "write_report", fail)
    assert generate(checkpoint, tmp_path, "--overwrite") == EXIT_INCOMPLETE
    assert names_in(tmp_path) == {"video.mp4"}


# --------------------------------------------------------------- prompts are text


@pytest.mark.parametrize(
    "prompt",
    [
        "$100 (50% off)",
        "costs $5 and $10",
        r"\frac{1}{2} $\frac{1}{2}$ \$ {x} ^_",
        "two\nlines\tand \x1b[31m colour \x00",
        "word " * 400,
    ],
)
def test_prompts_are_text_in_pictures(prompt, tmp_path, monkeypatch):
    shown = []
    save = Figure.savefig

    def save_and_look(self, *arguments, **options):
        shown.extend(axes.title for axes in self.axes)
        shown.append(self._suptitle)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save_and_look)
    # The user's own settings ask for formulas.
    monkeypatch.setitem(matplotlib.rcParams, "text.parse_math", True)
    kept = np.full((2, 3), 0.5)
    plots.plot_kept_share(tmp_path / "a.png", kept, np.ones(2), title=prompt)
    plots.plot_attention(
        tmp_path / "b.png",
        np.full((1, 1, 2, 2), 0.5),
        np.ones((1, 1, 2, 2), bool),
        layers=(0,),
        heads=(0,),
        blocks_per_frame=1,
        title=prompt,
    )
    words = " ".join("".join(c if c.isprintable() else " " for c in prompt).split())
    titles = [
        text
        for text in shown
        if text and words[:20] in " ".join(text.get_text().split())
    ]
    assert len(titles) == 2
    for title in titles:
        assert not title.get_parse_math()
        assert not title.get_usetex()
        text = " ".join(title.get_text().split())
        assert words in text or (len(words) > 400 and "[...]" in text)
        assert title.get_text().replace("\n", "").isprintable()


def test_letters_without_a_glyph_give_one_warning(tmp_path):
    kept = np.full((2, 3), 0.5)
    with pytest.warns(UserWarning, match="boxes for 6 letters") as caught:
        plots.plot_kept_share(
            tmp_path / "a.png", kept, np.ones(2), title="红色的球在跳"
        )
    assert len(caught) == 1


def test_lines_for_a_terminal_cannot_steer_it():
    assert one_line("a\x1b[2Jb\u202ec\nd") == "a\\x1b[2Jb\\u202ec d"
    assert one_line("红色 é ❤") == "红色 é ❤"


def test_file_names_that_are_no_text_are_reported_as_they_are(tmp_path):
    name = os.fsdecode(b"caf\xe9.safetensors")
    video_io.write_json(tmp_path / "report.json", {"lora": name})
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"lora": name}
