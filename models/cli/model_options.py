"""The options of which model a command loads, made without importing jax."""

import argparse
from pathlib import Path

from models.cli import choices


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds which model is loaded, from which files, and how it runs."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="folder of a published Wan or HunyuanVideo model in the original or "
        "diffusers layout, or its repository on the hub, such as "
        "Wan-AI/Wan2.1-T2V-1.3B; or the file of a transformer, FP8 too for Wan, with "
        "--vae and --text-encoder; or a folder in the format of models/mini/weights; "
        "the model that ships with the project if left out",
    )
    parser.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of a repository on the hub",
    )
    _add_part_options(parser)
    parser.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="[high:|low:]FILE[:STRENGTH]",
        help="adapter (safetensors) to merge into a published model; may be repeated; "
        "of two transformers into one, or into both",
    )
    parser.add_argument(
        "--lora-strict",
        choices=choices.LORA_STRICT,
        default="yes",
        help="no: skip parts of adapters that mean nothing to the model, with a note; "
        "yes: refuse them",
    )
    parser.add_argument(
        "--image-fit",
        choices=choices.IMAGE_FITS,
        default="aspect",
        help="aspect: the video has the image's aspect ratio and at most as many "
        "pixels as --size, as in Wan; crop: it has exactly the --size, and the middle "
        "of an image of another aspect ratio is kept",
    )
    parser.add_argument(
        "--linears",
        choices=choices.LINEARS,
        default=argparse.SUPPRESS,
        help="precision of the transformer's matrix products (a CPU takes float32 for "
        "bfloat16): float8 halves the memory of weights and is faster on Hopper and "
        f"Ada GPUs; auto takes it there alone (default: {choices.LINEARS[0]})",
    )
    _add_encoder_options(parser)
    add_process_options(parser)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds how the process compiles, and what it says of errors."""
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="compile anew, instead of keeping compiled programs in the user's cache "
        "folder (or in JAX_COMPILATION_CACHE_DIR)",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from"
    )


def _add_part_options(parser: argparse.ArgumentParser) -> None:
    """Adds the parts of a Wan model that are given by themselves."""
    for name, what in (
        ("vae", "autoencoder, such as Wan2.1_VAE.pth or wan_2.1_vae.safetensors"),
        (
            "text-encoder",
            "text encoder, such as models_t5_umt5-xxl-enc-bf16.pth or "
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        ),
        (
            "tokenizer",
            "tokenizer.json of the text encoder, if it does not lie beside it; "
            "google/umt5-xxl fetches it",
        ),
        (
            "text-encoder-2",
            "second text encoder, for HunyuanVideo: CLIP-L's text tower",
        ),
        ("tokenizer-2", "tokenizer of the second text encoder"),
        ("image-encoder", "image encoder, for image-to-video models"),
    ):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="PATH",
            help=f"{what}: a file, a folder, or a repository; those of --checkpoint if "
            "left out",
        )


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Adds how a Wan model's text encoder and autoencoder run."""
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="PATH",
        help="folder that keeps embeddings of prompts, so that later "
        "runs do not load the text encoder; or a .safetensors file of embeddings, with "
        "which none is needed",
    )
    parser.add_argument(
        "--text-device",
        choices=choices.TEXT_DEVICES,
        default="default",
        help="where the text encoder runs, before the transformer is loaded",
    )
    add_vae_options(parser)


def add_vae_options(parser: argparse.ArgumentParser) -> None:
    """Adds how the autoencoder runs."""
    parser.add_argument(
        "--vae-tile",
        type=int,
        metavar="PIXELS",
        help="run the autoencoder on tiles of this many rows and columns, a multiple "
        "of 32, or with 0 on whole frames (default: 256 on a GPU; on a CPU whole "
        "frames, but HunyuanVideo's own tiles); saves memory and changes the video a "
        "little",
    )
    parser.add_argument(
        "--vae-dtype",
        choices=choices.VAE_DTYPES,
        help="what the autoencoder computes in (default: float32 for Wan, bfloat16 for "
        "HunyuanVideo, but on a CPU float32); bfloat16 takes half the memory and "
        "changes the video a little",
    )


def parse_lora(text: str) -> tuple[Path, float]:
    """Returns file and strength of "FILE:STRENGTH"; the strength is 1 if left out."""
    name, _, strength = text.rpartition(":")
    try:
        return (Path(name), float(strength)) if name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
