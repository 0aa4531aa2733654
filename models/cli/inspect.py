"""`draft-video inspect`: draft maps and block masks as a picture."""

import argparse
from pathlib import Path

from draft_jax import AttentionPlan
from models.cli import options
from models.cli.model import read_request
from models.cli.progress import progress_bar
from models.diffusion.inspection import AttentionView, inspect_attention
from models.media import plots
from models.media import video as video_io


def run(arguments: argparse.Namespace) -> None:
    """Runs the model and draws."""
    video_io.check_video_extra()
    attention = AttentionPlan.draft(*options.draft_from(arguments))
    path = getattr(arguments, "output", None)
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"--output {path} must end in .png")
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"--output {path} is a folder")
    options.check_writable(Path("outputs") if path is None else path.parent)
    request = read_request(arguments)
    sampling = request.sampling
    pipeline = request.load()
    step = getattr(arguments, "step", sampling.num_steps // 2)
    if path is None:
        name = f"{options.slug(arguments.prompt)}-{sampling.seed}-step{step}.png"
        path = Path("outputs") / name
    model = pipeline.model
    layers = getattr(arguments, "layers", _spread(model.num_layers))
    heads = getattr(arguments, "heads", tuple(range(min(4, model.num_heads))))
    plots.check_indices("layers", layers, model.num_layers)
    plots.check_indices("heads", heads, model.num_heads)
    with progress_bar(f"to step {step}", step) as callback:
        view = inspect_attention(
            pipeline,
            arguments.prompt,
            sampling,
            image=request.image,
            step=step,
            attention=attention,
            callback=callback,
        )
    blocks = view.grid.num_visual_blocks
    plots.plot_attention(
        path,
        view.draft_maps,
        view.masks,
        layers=layers,
        heads=heads,
        blocks_per_frame=blocks // view.grid.frames,
        title=f"{arguments.prompt}\nstep {step}, timestep {view.timestep:.0f}, "
        f"{blocks} x {blocks} tiles",
    )
    print(_table(view))
    print(path)


def _spread(num_layers: int) -> tuple[int, ...]:
    """Returns the first, middle and last layer."""
    return tuple(sorted({0, num_layers // 2, num_layers - 1}))


def _table(view: AttentionView) -> str:
    lines = [
        "layer  tile pairs kept  softmax mass in them  in the strongest 10 % of pairs"
    ]
    for layer, masks in enumerate(view.masks):
        note = "   (dense at this step)" if view.is_dense[layer] else ""
        lines.append(
            f"{layer:5d}  {100 * masks.mean():14.1f}%  "
            f"{100 * view.kept_mass[layer].mean():19.1f}%  "
            f"{100 * view.top_mass[layer].mean():28.1f}%{note}"
        )
    return "\n".join(lines)
