"""Checkpoints by name: a folder on this machine, or a repository on a model hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.checkpoints.memory_map import CheckpointError

INSTALL_WAN_EXTRA = "pip install '.[wan]' in a clone of draft_jax"
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# Names of files: no model is a repository whose name ends so, a path may.
_FILE_SUFFIXES = frozenset(
    [
        ".bin",
        ".ckpt",
        ".gguf",
        ".gz",
        ".json",
        ".onnx",
        ".pt",
        ".pth",
        ".safetensors",
        ".tar",
        ".zip",
    ]
)


class HubError(CheckpointError):
    """A checkpoint cannot be fetched from the hub."""


def find_checkpoint(
    name: str | os.PathLike,
    *,
    patterns: Sequence[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Returns a checkpoint's folder, fetched from the hub if it is not here.

    What was fetched once is not fetched again, and a download that was interrupted
    goes on where it stopped. Progress is shown on stderr.

    Args:
      name: A path, or else a repository such as "Wan-AI/Wan2.1-T2V-1.3B".
      patterns: Files of a repository that are needed, with `*` for any characters;
        no others are fetched.
      revision: Branch, tag or commit of a repository; its main branch if None.
      cache_dir: Folder that keeps repositories; Hugging Face's cache if None.

    Returns:
      An existing path. It need not hold what the patterns name.

    Raises:
      HubError: There is no such path or repository, or it cannot be fetched; says
        why and what helps.
      ImportError: `huggingface_hub` is needed and not installed.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise HubError(
                f"{revision=} is given for {os.fspath(name)}, a path on this machine; "
                "only repositories on the hub have revisions"
            )
        return path
    if not is_repository_name(name):
        raise HubError(why_not_found(name))
    return _fetch(
        os.fspath(name),
        allow_patterns=[*patterns],
        revision=revision,
        cache_dir=cache_dir,
    )


def commit_of(path: Path) -> str | None:
    """Returns the commit that a folder of the hub's cache is of; None of others."""
    return path.name if path.parent.name == "snapshots" else None


def is_repository_name(name: str | os.PathLike) -> bool:
    """Tells whether a path that does not exist may be a repository, `owner/name`.

    It may not if it looks like a path that was mistyped: if it starts with ".", "~"
    or "/", has another number of slashes than one, ends as a file does, or begins
    with a folder that exists here.
    """
    text = os.fspath(name)
    if not _REPOSITORY.fullmatch(text):
        return False
    path = Path(text)
    return path.suffix.lower() not in _FILE_SUFFIXES and not path.parent.exists()


def why_not_found(name: str | os.PathLike) -> str:
    """Says that a name is neither a path nor a repository, and what lies nearest."""
    path = Path(name).expanduser().absolute()
    nearest = next(parent for parent in path.parents if parent.exists())
    looks_local = ""
    if _REPOSITORY.fullmatch(os.fspath(name)) and nearest == path.parent:
        looks_local = (
            "; a repository of this name is fetched from a working directory without "
            f"a folder {nearest.name}"
        )
    return (
        f"{os.fspath(name)} does not exist; expected a folder, or a repository on the "
        f"hub (owner/name, such as Wan-AI/Wan2.1-T2V-1.3B); of the path, {nearest} "
        f"exists{looks_local}"
    )


def _fetch(repository: str, **options: Any) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"{repository} is no folder here; to fetch it from the hub, run "
            f"{INSTALL_WAN_EXTRA} ({error})"
        ) from error
    revision = options["revision"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, **options))
    except errors.GatedRepoError as error:
        reason = (
            f"wants its terms accepted first: at https://huggingface.co/{repository}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
        raise HubError(f"{repository} {reason}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repository} is neither a folder here nor a repository on the hub; one "
            "that is private needs `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository} has no {revision=}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{repository} is no folder here, and {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{repository} is no folder here and not, or not whole, in the cache, and "
            f"the hub cannot be reached: check the network and HF_HUB_OFFLINE ({error})"
        ) from error
    except Exception as error:  # of the network libraries that the hub's uses in turn
        raise HubError(
            f"fetching {repository} failed: {error!r}; what has arrived is kept, run "
            "again to go on"
        ) from error
