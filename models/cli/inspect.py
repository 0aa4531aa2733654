"""`draft-video inspect`: draft maps and block masks as a picture."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

from draft_jax import AttentionPlan
from models.cli import options, outputs
from models.cli.model import read_request
from models.cli.progress import progress_bar
from models.cli.report import device_details
from models.diffusion.inspection import AttentionView, inspect_attention
from models.diffusion.recording import record_of_view
from models.files import MissingFilesError
from models.media import plots
from models.media import video as video_io
from models.report.explorer import explorer_data
from models.report.writing import write_report


def run(arguments: argparse.Namespace) -> None:
    """Runs the model and draws."""
    video_io.check_video_extra()
    options.draft_from(arguments)
    seeds = getattr(arguments, "seeds", ())
    if len(seeds) > 1:
        raise ValueError(
            f"--seed {','.join(map(str, seeds))}: inspect looks at one run; give one "
            "seed"
        )
    path = getattr(arguments, "output", None)
    if path is None:
        outputs.check_writable(outputs.FOLDER)
    else:
        outputs.check_picture(path, overwrite=arguments.overwrite)
    request = read_request(arguments)
    sampling = request.sampling
    step = getattr(arguments, "step", sampling.num_steps // 2)
    if path is None:
        name = outputs.run_name(arguments, sampling, request.info.published)
        path = outputs.FOLDER / f"{name}-step{step}.png"
        outputs.check_picture(path, overwrite=arguments.overwrite)
    details = request.details()
    pipeline = request.load()
    details["hardware"] |= device_details()
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
            attention=AttentionPlan.draft(*request.draft),
            callback=callback,
        )
    print(_table(view))  # before the files, which may fail
    blocks = view.grid.num_visual_blocks
    title = f"step {step}, timestep {view.timestep:.0f}, {blocks} x {blocks} tiles"
    draw = functools.partial(
        plots.plot_attention,
        draft_maps=view.draft_maps,
        masks=view.masks,
        layers=layers,
        heads=heads,
        blocks_per_frame=blocks // view.grid.frames,
        title=f"{arguments.prompt}\n{title}",
        text=_text_shares(view),
    )

    def write_page(path: Path) -> None:
        record = record_of_view(
            view, step=step, of_steps=sampling.num_steps, layers=layers, heads=heads
        )
        video = pipeline.preview_video(view.estimate[None])[0]
        explorer = None if record is None else explorer_data(record, video)
        report = details | {"step": step, "timestep": view.timestep}
        write_report(path, report, explorer=explorer)

    _write_files({path: draw, outputs.page_of(path): write_page})


def _write_files(writers: dict[Path, Callable[[Path], None]]) -> None:
    """Writes files, of which one that fails costs no other.

    Raises:
      MissingFilesError: Names those that failed.
    """
    missing: dict[Path, Exception] = {}
    for path, write in writers.items():
        try:
            write(path)
        except Exception as error:
            missing[path] = error
        else:
            print(path)
    if missing:
        raise MissingFilesError(missing) from next(iter(missing.values()))


def _spread(num_layers: int) -> tuple[int, ...]:
    """Returns the first, middle and last layer."""
    return tuple(sorted({0, num_layers // 2, num_layers - 1}))


def _text_shares(view: AttentionView) -> plots.TextShares | None:
    """Returns what lies on the text, if the sequence has one."""
    grid = view.grid
    if not grid.text_length:
        return None
    return plots.TextShares(
        share=view.text_share,
        masses=view.text_masses[..., grid.visual_blocks].sum(-2),
        is_first=grid.text_side == "before",
    )


def _table(view: AttentionView) -> str:
    has_text = view.grid.text_length > 0
    lines = [
        "layer  tile pairs kept  softmax mass in them  in the strongest 10 % of pairs"
        + ("  on text" if has_text else "")
    ]
    for layer, masks in enumerate(view.masks):
        note = "   (dense at this step)" if view.is_dense[layer] else ""
        on_text = f"  {100 * view.text_share[layer].mean():6.1f}%" if has_text else ""
        lines.append(
            f"{layer:5d}  {100 * masks.mean():14.1f}%  "
            f"{100 * view.kept_mass[layer].mean():19.1f}%  "
            f"{100 * view.top_mass[layer].mean():28.1f}%{on_text}{note}"
        )
    return "\n".join(lines)
