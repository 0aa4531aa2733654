"""Settings of HunyuanVideo's own sampler, and its sizes by name."""

from typing import Any, Literal, get_args

from models.diffusion.sampling import Sampling

HunyuanSize = Literal["540p", "720p"]

# Height and width by name.
HUNYUAN_PIXELS: dict[str, tuple[int, int]] = {"540p": (544, 960), "720p": (720, 1280)}


def hunyuan_sampling(size: HunyuanSize = "720p", **changes: Any) -> Sampling:
    """Returns HunyuanVideo's own settings: 129 frames, 50 Euler steps with shift 7.

    The model is told of a guidance of 6 and runs no negative prompt.

    Args:
      size: "540p" is 544 x 960 pixels, "720p" is 720 x 1280.
      **changes: Fields of `Sampling` to set instead.

    Raises:
      ValueError: There is no such size, or a change is out of range.

    Source: Tencent-Hunyuan/HunyuanVideo `hyvideo/config.py`, README.
    """
    if size not in get_args(HunyuanSize):
        raise ValueError(f"{size=} must be one of {get_args(HunyuanSize)}")
    height, width = HUNYUAN_PIXELS[size]
    settings: dict[str, Any] = {
        "frames": 129,
        "height": height,
        "width": width,
        "num_steps": 50,
        "guidance": 1.0,
        "embedded_guidance": 6.0,
        "shift": 7.0,
        "solver": "euler",
        "grid": "linear",
    }
    return Sampling(**(settings | changes))
