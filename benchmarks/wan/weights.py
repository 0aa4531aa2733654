"""Writes a folder of a Wan model with random weights, at the speed of the disk.

Every tensor is cut from one block of random numbers, so a model of 28 GB costs no
more arithmetic than the block.
"""

import concurrent.futures
import json
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from flax import nnx

from models.checkpoints.rules import Lookup
from models.wan.config import WanConfig
from models.wan.convert import RULES, STACKED
from models.wan.transformer import WanTransformer

STEM = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 4_500_000_000
STANDARD_DEVIATION = 0.02
# Odd, so that rows of a matrix are not copies of one another.
BLOCK_NUMBERS = (1 << 24) + 43
ITEM_BYTES = 2  # bfloat16


def tensor_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by its key in the diffusers layout.

    From the model's abstract parameters and the conversion table turned round.

    Raises:
      ValueError: A parameter is written by no rule of the table, or by several.
    """
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0)))
    lookup = Lookup(RULES["diffusers"])
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        first, *rest = map(str, path)
        stacked = first in STACKED
        shape = leaf.shape[1:] if stacked else leaf.shape
        for layer in range(leaf.shape[0]) if stacked else [None]:
            names = [first, *([] if layer is None else [str(layer)]), *rest]
            written = lookup.of_path(".".join(names))
            if len(written) != 1:
                raise ValueError(f"parameter {names} has keys {written}; expected one")
            ((key, rule),) = written
            stand_in = np.broadcast_to(np.float32(0), shape)
            shapes[key] = rule.layout.save(stand_in).shape
    return shapes


def split_shards(
    shapes: Mapping[str, tuple[int, ...]], max_shard_bytes: int
) -> list[list[str]]:
    """Keys of each file, none with more bytes than allowed unless it is one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        nbytes = ITEM_BYTES * int(np.prod(shape))
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards


def is_norm_scale(key: str) -> bool:
    """Whether the tensor multiplies what was normalised: it is 1, not random."""
    return key.endswith(".weight") and "norm" in key.split(".")[-2]


def write_shard(
    file: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    block: np.ndarray,
    seed: int,
) -> int:
    """Writes one safetensors file; its size in bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, shape in shapes.items():
        end = offset + ITEM_BYTES * int(np.prod(shape))
        header[key] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with file.open("wb", buffering=0) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            missing = int(np.prod(shape))
            if is_norm_scale(key):
                ones = np.ones(missing, ml_dtypes.bfloat16)
                stream.write(ones.view(np.uint8).data)
                continue
            start = int(rng.integers(block.size))
            while missing:
                part = block[start : start + missing]
                _write_all(stream, part.view(np.uint8).data)
                missing -= part.size
                start = 0
    return file.stat().st_size


def _write_all(stream, data: memoryview) -> None:
    """Unbuffered files may take less than they are given."""
    while data:
        data = data[stream.write(data) :]


def write_folder(
    config: WanConfig,
    folder: pathlib.Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    seed: int = 0,
) -> list[int]:
    """Writes the transformer of a folder in the diffusers layout, in bfloat16.

    Args:
      config: Sizes of the model.
      folder: Where to; made if it does not exist.
      max_shard_bytes: Most bytes of tensors in a file.
      seed: Of the weights.

    Returns:
      Bytes of each shard.
    """
    part = folder / "transformer"
    part.mkdir(parents=True, exist_ok=True)
    for old in part.glob(f"{STEM}*"):
        old.unlink()
    rng = np.random.default_rng(seed)
    block = STANDARD_DEVIATION * rng.standard_normal(BLOCK_NUMBERS, np.float32)
    block = block.astype(ml_dtypes.bfloat16)
    shapes = tensor_shapes(config)
    shards = split_shards(shapes, max_shard_bytes)
    files = [
        part / f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        written = pool.map(
            lambda file, keys, number: write_shard(
                file, {key: shapes[key] for key in keys}, block, seed + number
            ),
            files,
            shards,
            range(len(shards)),
        )
        sizes = list(written)
    weight_map = {
        key: file.name for file, keys in zip(files, shards, strict=True) for key in keys
    }
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (part / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    (part / "config.json").write_text(json.dumps(config.to_dict()))
    return sizes
