"""Writes and reads videos, pictures and JSON. A file is whole or absent."""

import concurrent.futures
import errno
import importlib.util
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import einops
import numpy as np
from jaxtyping import Float, UInt8

from models.files import whole_file, write_whole

VIDEO_EXTRA_MODULES = ("imageio_ffmpeg", "matplotlib", "tqdm")
INSTALL_VIDEO_EXTRA = "pip install '.[video]' in a clone of draft_jax"
H264_CRF = 16  # 0 is lossless, 23 x264's default; small videos can afford it
PREVIEW_CRF = 26
MAX_SIDE = 16_384  # pixels, of x264
# Far beyond these ffmpeg's containers overflow, at the end of a run.
MIN_FPS, MAX_FPS = 0.01, 1000

FloatVideo = Float[np.ndarray, "_F _H _W 3"]
ByteVideo = UInt8[np.ndarray, "_F _H _W 3"]


class MissingExtraError(ImportError):
    """A package of the optional extra `video` is not installed."""


def check_video_extra() -> None:
    """Raises before any compute if the packages that write videos are missing.

    Raises:
      MissingExtraError: Names the missing packages and the command to run.
    """
    missing = [
        name for name in VIDEO_EXTRA_MODULES if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingExtraError(
            f"writing videos and pictures needs {', '.join(missing)}: run "
            f"{INSTALL_VIDEO_EXTRA}"
        )


def check_ffmpeg() -> None:
    """Raises before any compute if ffmpeg cannot write H.264: encodes a frame.

    Raises:
      MissingExtraError: There is no ffmpeg, or it lacks the encoder.
    """
    try:
        options = _h264_options(width=16, height=16, fps=1)
        _run_ffmpeg(*options, "-f", "null", "-", stdin=bytes(16 * 16 * 3))
    except (OSError, RuntimeError) as error:
        raise MissingExtraError(
            f"videos need an ffmpeg with libx264: {error}; run {INSTALL_VIDEO_EXTRA}, "
            "or name one in the variable IMAGEIO_FFMPEG_EXE"
        ) from error


def to_bytes(video: FloatVideo) -> ByteVideo:
    """Rounds values in [0, 1] to 0 .. 255; values outside are clipped."""
    return np.rint(np.clip(video, 0.0, 1.0) * 255.0).astype(np.uint8)


def side_by_side(left: FloatVideo, right: FloatVideo) -> FloatVideo:
    """Joins two videos of equal shape along the width."""
    if left.shape != right.shape:
        raise ValueError(
            f"left has shape {left.shape} and right {right.shape}; they must be equal"
        )
    return np.concatenate([left, right], axis=2)


def check_fps(fps: int | float) -> None:
    """Raises before any compute for frames per second that no file can say.

    Raises:
      ValueError: `fps` is not in [0.01, 1000].
    """
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"{fps=} must be in [{MIN_FPS}, {MAX_FPS}]")


def check_frame_size(height: int, width: int) -> None:
    """Raises before any compute if frames are larger than H.264 allows.

    Args:
      height: Rows of a frame.
      width: Columns of a frame; those of both videos if they stand side by side.

    Raises:
      ValueError: A side is above 16,384 pixels.
    """
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"frames of {height} x {width} pixels: an H.264 video has at most "
            f"{MAX_SIDE} in a row or column"
        )


def write_mp4(path: Path, video: FloatVideo, *, fps: int | float) -> None:
    """Writes an H.264 video that browsers play.

    Args:
      path: File to write, ending in .mp4.
      video: Values in [0, 1]. Height and width are even, which 4:2:0 colour needs.
      fps: Frames per second.

    Raises:
      ValueError: The suffix is not .mp4; a side is odd or too long; or fps is out of
        range.
      MissingExtraError: imageio-ffmpeg is not installed.
      OSError: ffmpeg failed, or the disk is full.
    """
    height, width = video.shape[1:3]
    if path.suffix != ".mp4":
        raise ValueError(f"path={str(path)!r} must end in .mp4")
    if height % 2 or width % 2:
        raise ValueError(f"frames of {height} x {width} pixels: both must be even")
    check_frame_size(height, width)
    check_fps(fps)
    with whole_file(path) as temporary:
        _run_ffmpeg(
            *_h264_options(width=width, height=height, fps=fps),
            *("-movflags", "+faststart", _file(temporary)),
            stdin=to_bytes(video).tobytes(),
        )


def read_mp4(path: Path) -> ByteVideo:
    """Decodes every frame of a video file.

    Raises:
      FileNotFoundError: There is no such file.
      MissingExtraError: imageio-ffmpeg is not installed.
      OSError: ffmpeg failed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file")
    # Portable pixmaps say their own size: a header of three lines, then RGB bytes.
    pixmaps = _run_ffmpeg(
        *("-i", _file(path), "-fps_mode", "passthrough"),
        *("-f", "image2pipe", "-c:v", "ppm", "-"),
    )
    header = b"\n".join(pixmaps.split(b"\n", 3)[:3]) + b"\n"
    width, height = (int(side) for side in header.split()[1:3])
    rows = np.frombuffer(pixmaps, np.uint8)
    frames = rows.reshape(-1, len(header) + height * width * 3)[:, len(header) :]
    return einops.rearrange(
        frames, "F (H W colours) -> F H W colours", H=height, W=width
    )


def encode_preview(path: Path, *, most_bytes: int) -> bytes | None:
    """Returns a video file again as H.264 of at most so many bytes.

    Every frame is there. Sides are halved until it fits, three times at most.

    Returns:
      The bytes of an MP4; None if the smallest is still too large.

    Raises:
      FileNotFoundError: There is no such file.
      MissingExtraError: imageio-ffmpeg is not installed.
      OSError: ffmpeg failed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file")
    for halvings in range(4):
        side = "max(2\\,trunc({}/" + str(2 ** (halvings + 1)) + ")*2)"
        with tempfile.TemporaryDirectory() as folder:
            preview = Path(folder) / "preview.mp4"
            _run_ffmpeg(
                *("-i", _file(path), "-fps_mode", "passthrough", "-an"),
                *("-vf", f"scale={side.format('iw')}:{side.format('ih')}"),
                *f"-c:v libx264 -crf {PREVIEW_CRF} -pix_fmt yuv420p".split(),
                *("-movflags", "+faststart", str(preview)),
            )
            data = preview.read_bytes()
        if len(data) <= most_bytes:
            return data
    return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes strict JSON, indented.

    Names of files that are no text, which Python keeps as lone surrogates, are written
    as JSON's escapes of these, and so read back as they were.

    Raises:
      ValueError: A number is infinite or NaN, which JSON cannot say.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    write_whole(path, f"{text}\n".encode(errors="backslashreplace"))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that `write_json` has written.

    Raises:
      OSError: It cannot be read.
      ValueError: It is no JSON object.
    """
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected an object")
    return content


def _file(path: Path) -> str:
    """Returns a path as ffmpeg's argument.

    Of a relative one, a dash would begin an option, and "a:" a protocol.
    """
    return str(path.absolute())


def _h264_options(*, width: int, height: int, fps: int | float) -> list[str]:
    """Returns ffmpeg's options for RGB bytes on stdin and H.264 out of them."""
    return [
        *f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split(),
        *f"-an -c:v libx264 -crf {H264_CRF} -pix_fmt yuv420p".split(),
    ]


def _run_ffmpeg(*arguments: str, stdin: bytes | None = None) -> bytes:
    """Runs the ffmpeg of imageio-ffmpeg and returns what it prints.

    Its own Python wrapper forks with a preexec_fn, which jax warns about because its
    threads may then deadlock, and leaves ffmpeg writing after an interrupt.
    """
    check_video_extra()
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *arguments]
    status, output, errors = _run_child(command, stdin)
    if status != 0:
        words = errors.decode(errors="replace").strip()
        if os.strerror(errno.ENOSPC) in words:
            raise OSError(errno.ENOSPC, words)
        line = (words.splitlines() or ["no text"])[-1]
        raise OSError(f"ffmpeg failed with status {status}: {line}")
    return output


def _run_child(command: list[str], stdin: bytes | None) -> tuple[int, bytes, bytes]:
    """Runs a program, which does not outlive an interrupt.

    `subprocess.run` forgets a child if an interrupt comes while it starts one: handlers
    run as soon as the call that makes the child returns, before its number is kept.
    They run in the main thread only, so another one starts it.

    Returns:
      The exit status, the output and the errors.
    """
    children: list[subprocess.Popen] = []

    def start() -> None:
        child = subprocess.Popen(
            command,
            stdin=None if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that it does not see Ctrl-C, but is killed
        )
        children.append(child)

    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # waits for its thread
            pool.submit(int).result()  # now it has one; a new one could be forgotten
            pool.submit(start).result()
        (child,) = children
        output, errors = child.communicate(stdin)
    except BaseException:
        for child in children:
            child.kill()
            child.wait()
        raise
    return child.returncode, output, errors
