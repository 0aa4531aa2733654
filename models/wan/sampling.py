"""Settings of Wan's own samplers, and its sizes by name."""
# ruff: noqa: RUF001  Chinese has its own comma.

from typing import Any, Literal, get_args

from models.diffusion.sampling import Sampling

WanSize = Literal["480p", "720p"]
WanTask = Literal["text", "image"]

# Wan's own sampler leads away from this if it is not told otherwise: garish colours,
# overexposure, stillness, subtitles, JPEG artefacts, malformed hands and faces.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
# From an image, away from a shaking camera too.
WAN_IMAGE_NEGATIVE_PROMPT = "镜头晃动，" + WAN_NEGATIVE_PROMPT

# The noise level, of 1, at which a pair's transformers change: Wan2.2 `wan/configs`.
WAN_BOUNDARIES: dict[WanTask, float] = {"text": 0.875, "image": 0.9}

# Height and width by name.
WAN_PIXELS: dict[str, tuple[int, int]] = {"480p": (480, 832), "720p": (720, 1280)}


def wan_sampling(
    size: WanSize = "720p", *, task: WanTask = "text", **changes: Any
) -> Sampling:
    """Returns the settings of Wan2.1's own `generate.py`: 81 frames, UniPC, guidance 5.

    For the 1.3B model its README advises `guidance=6.0` and a shift of 8 to 12.

    Args:
      size: "480p" is 480 x 832 pixels, "720p" is 720 x 1280.
      task: Source of the video. From text in 50 steps with shift 5; from an image in
        40, with shift 3 at 480p.
      **changes: Fields of `Sampling` to set instead.

    Raises:
      ValueError: There is no such size or task, or a change is out of range.

    Source: Wan-Video/Wan2.1 `generate.py`, `wan/configs`, README.
    """
    if size not in get_args(WanSize):
        raise ValueError(f"{size=} must be one of {get_args(WanSize)}")
    if task not in get_args(WanTask):
        raise ValueError(f"{task=} must be one of {get_args(WanTask)}")
    height, width = WAN_PIXELS[size]
    from_text = task == "text"
    settings: dict[str, Any] = {
        "frames": 81,
        "height": height,
        "width": width,
        "num_steps": 50 if from_text else 40,
        "guidance": 5.0,
        "shift": wan_shift(task, height, width),
        "solver": "unipc",
        "negative_prompt": (
            WAN_NEGATIVE_PROMPT if from_text else WAN_IMAGE_NEGATIVE_PROMPT
        ),
    }
    return Sampling(**(settings | changes))


def ti2v_sampling(**changes: Any) -> Sampling:
    """Returns the settings of Wan2.2's own `generate.py` for TI2V-5B.

    From text and from an image these are 121 frames of 704 x 1280 pixels, made in 50
    steps of UniPC with shift 5 and guidance 5.

    Args:
      **changes: Fields of `Sampling` to set instead.

    Raises:
      ValueError: A change is out of range.

    Source: Wan-Video/Wan2.2 `wan/configs/wan_ti2v_5B.py`, `shared_config.py`.
    """
    settings: dict[str, Any] = {"frames": 121, "height": 704, "width": 1280}
    return wan_sampling(**(settings | changes))


def a14b_sampling(
    size: WanSize = "720p", *, task: WanTask = "text", **changes: Any
) -> Sampling:
    """Returns the settings of Wan2.2's own `generate.py` for the A14B models.

    81 frames in 40 steps of UniPC. From text the shift is 12, guidance 4 for high
    noise, which is a timestep of at least 875, and 3 for low. From an image the shift
    is 5, guidance 3.5 and the boundary 900.

    Args:
      size: As in `wan_sampling`.
      task: Source of the video.
      **changes: Fields of `Sampling` to set instead.

    Raises:
      ValueError: There is no such size or task, or a change is out of range.

    Source: Wan-Video/Wan2.2 `wan/configs/wan_t2v_A14B.py`, `wan_i2v_A14B.py`.
    """
    settings: dict[str, Any] = {
        "num_steps": 40,
        "guidance": 4.0 if task == "text" else 3.5,
        "low_guidance": 3.0 if task == "text" else 3.5,
        "boundary": 1000 * WAN_BOUNDARIES[task],
        "shift": 12.0 if task == "text" else 5.0,
        "negative_prompt": WAN_NEGATIVE_PROMPT,
    }
    return wan_sampling(size, task=task, **(settings | changes))


def wan_shift(task: WanTask, height: int, width: int) -> float:
    """Returns the shift of the noise levels in Wan2.1's `generate.py`.

    It is 5, or 3 for videos from an image at 480p, wide or tall.
    """
    is_480p = sorted((height, width)) == sorted(WAN_PIXELS["480p"])
    return 3.0 if task == "image" and is_480p else 5.0
