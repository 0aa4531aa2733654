"""Names of outputs, and what can be refused about them before anything is computed."""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from draft_jax import SparsitySchedule
from models.cli import options
from models.cli.pair_options import LOW_NOISE
from models.diffusion.sampling import Sampling
from models.media.run_folder import earlier_files

FOLDER = Path("outputs")
_MOST_NAME_BYTES = 255  # of one name, in the file systems in use
_MOST_PROMPT_BYTES = 96  # of a name, which has the seed and the hash beside it
# What `options.draft_from` reads, which says what was left out, too.
_OF_DRAFT = (
    "sparsity",
    "selection",
    "pooling",
    "edge_tiles",
    "correction",
    "top_p",
    "dense_fraction",
    "dense_layers",
    "mask_refresh",
    *LOW_NOISE,
)
# Options that change neither a pixel nor a number of what is written. What --speed
# changes is in the options that it stands for.
_WITHOUT_EFFECT = (
    *("argv", "output", "overwrite", "debug", "no_compile_cache"),
    *("speed", "by_speed"),
)


def run_name(
    arguments: argparse.Namespace,
    sampling: Sampling,
    published: SparsitySchedule | None = None,
) -> str:
    """Returns "<prompt>-<seed>-<hash>", which other settings do not share.

    The hash is of the whole prompt and of every option, with the values that the
    checkpoint gives to those that were left out.

    Args:
      arguments: The parsed command line.
      sampling: The settings of the run; its seed is that of the video.
      published: See `options.draft_from`.
    """
    in_sampling = {field.name for field in dataclasses.fields(Sampling)}
    in_sampling |= {"size", "seeds", *_OF_DRAFT}
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in in_sampling and name not in _WITHOUT_EFFECT
    }
    settings["sampling"] = dataclasses.asdict(sampling)
    draft = options.draft_from(arguments, published)
    settings["draft"] = [dataclasses.asdict(part) for part in draft]
    text = json.dumps(settings, default=str, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{words_of(arguments.prompt)}-{sampling.seed}-{digest}"


def folders_of_seeds(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """Returns where the runs of some seeds go: one in `folder`, several below it."""
    if len(seeds) < 2:
        return [folder]
    return [folder / str(seed) for seed in seeds]


def words_of(prompt: str) -> str:
    """Returns the letters and digits of a prompt, of every script, as part of a name.

    Lower case, with one dash for whatever lies between, and cut at 96 bytes.
    """
    text = unicodedata.normalize("NFC", prompt).lower()
    text = "".join(
        character if unicodedata.category(character)[0] in "LMN" else "-"
        for character in text
    )
    # A mark that follows no letter would join the dash.
    marks = {c for c in text if unicodedata.category(c)[0] == "M"}
    text = re.sub(rf"(^|-)[{''.join(marks)}]+", "-", text) if marks else text
    words = re.sub("-+", "-", text).strip("-")
    cut = words.encode()[:_MOST_PROMPT_BYTES].decode(errors="ignore")
    return cut.rstrip("-") or "video"


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises before any compute if a run cannot write its files to a folder.

    Args:
      folder: The folder; it need not exist.
      overwrite: Whether files of an earlier run may be replaced.

    Raises:
      FileExistsError: It has files of an earlier run.
      OSError: The folder cannot be made or written to, or a file has the name of a
        folder in it.
    """
    check_writable(folder)
    earlier = earlier_files(folder)
    for path in earlier:
        if path.is_dir():
            raise IsADirectoryError(f"--output {folder}: {path} is a folder")
    if earlier and not overwrite:
        names = " and ".join(path.name for path in earlier)
        raise FileExistsError(
            f"--output {folder}: an earlier run has left {names} there; --overwrite "
            "replaces the files of a run, or name another folder"
        )


def check_picture(path: Path, *, overwrite: bool) -> None:
    """Raises before any compute if a picture and its page cannot be written.

    Args:
      path: Picture to write, ending in .png; its folder need not exist. The page
        beside it is `page_of(path)`.
      overwrite: Whether existing files may be replaced.

    Raises:
      FileExistsError: There is such a file.
      OSError: One of them cannot be written.
      ValueError: The path does not end in .png.
    """
    _check_suffix(path, ".png")
    check_writable(path.parent)
    for file in (path, page_of(path)):
        _check_file(path, file, overwrite=overwrite)


def check_ratios(path: Path, *, overwrite: bool) -> None:
    """Raises before any compute if a file of ratios cannot be written to a path.

    Args:
      path: File to write, ending in .json; its folder need not exist.
      overwrite: Whether an existing file may be replaced.

    Raises:
      FileExistsError: There is such a file.
      OSError: It cannot be written.
      ValueError: It does not end in .json.
    """
    _check_suffix(path, ".json")
    check_writable(path.parent)
    _check_file(path, path, overwrite=overwrite)


def page_of(picture: Path) -> Path:
    """Returns where the page of a picture lies: beside it, as an HTML file."""
    return picture.with_suffix(".html")


def check_writable(folder: Path) -> None:
    """Raises before any compute if a folder cannot be made or written to.

    Raises:
      OSError: Names the folder that is in the way.
    """
    for path in (folder, *folder.parents):
        _check_name(folder, path.name)
    existing = folder
    while not existing.exists():
        if existing.is_symlink():
            raise _dangling(folder, existing)
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"--output {folder}: {existing} is not a folder")
    try:  # permissions alone do not tell of a read-only or special file system
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"--output {folder}: {existing} cannot be written to ({error.strerror})"
        ) from error


def _check_suffix(path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ValueError(f"--output {path} must end in {suffix}")


def _check_file(path: Path, file: Path, *, overwrite: bool) -> None:
    """Raises if a file cannot be written; messages call it --output `path`."""
    named = f"--output {path}" if file == path else f"--output {path}: {file}"
    _check_name(file, file.name)
    if file.is_dir():
        raise IsADirectoryError(f"{named} is a folder")
    if file.is_symlink() and not file.exists():
        raise _dangling(path, file)
    if file.exists() and not overwrite:
        raise FileExistsError(
            f"{named} exists; --overwrite replaces it, or name another file"
        )


def _check_name(output: Path, name: str) -> None:
    size = len(os.fsencode(name))
    if size > _MOST_NAME_BYTES:
        raise OSError(
            f"--output {output}: the name {name[:20]}... has {size} bytes; a name may "
            f"have {_MOST_NAME_BYTES}"
        )


def _dangling(output: Path, link: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"--output {output}: {link} is a link to {os.readlink(link)}, which does not "
        "exist"
    )
