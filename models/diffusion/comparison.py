"""Dense against sparse: two runs from the same noise, and how they differ."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.diffusion.results import GenerationResult
from models.media import plots
from models.media import video as video_io
from models.media.metrics import finite_or_null, psnr, psnr_per_frame, ssim
from models.media.run_folder import KEPT_SHARE, REPORT, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A dense and a sparse run of one prompt from the same noise.

    Raises:
      ValueError: The videos differ in shape, or there is more than one of a kind.
    """

    dense: GenerationResult
    sparse: GenerationResult

    def __post_init__(self) -> None:
        shapes = self.dense.video.shape, self.sparse.video.shape
        if shapes[0] != shapes[1] or shapes[0][0] != 1:
            raise ValueError(f"videos of shapes {shapes} must be equal, one video each")

    def report(self) -> dict[str, Any]:
        """Returns everything measured, ready for strict JSON.

        PSNR and SSIM are of the sparse video against the dense one, before video
        compression. It is null for equal videos and frames, where it is infinite.
        """
        sparse_steps = np.array([work == "sparse" for work in self.sparse.work])
        # Of a sparse run that was stopped: the steps that both have.
        dense_time_ms = self.dense.time_ms[: len(sparse_steps)]
        speed_up = None
        if sparse_steps.any():
            dense_ms = np.median(dense_time_ms[sparse_steps])
            speed_up = float(dense_ms / np.median(self.sparse.time_ms[sparse_steps]))
        return {
            **self._differences,
            "sparse_steps": int(sparse_steps.sum()),
            "skipped_steps": int(self.sparse.skipped.sum()),
            "speed_up_of_sparse_steps": speed_up,
            "speed_up_of_all_steps": float(
                dense_time_ms.sum() / self.sparse.time_ms.sum()
            ),
            "dense": run_report(self.dense),
            "sparse": run_report(self.sparse),
        }

    @functools.cached_property
    def _differences(self) -> dict[str, Any]:
        """Measured once, for it takes seconds on large videos."""
        dense, sparse = self.dense.video[0], self.sparse.video[0]
        return {
            "psnr_db": finite_or_null([psnr(sparse, dense)])[0],
            "psnr_db_per_frame": finite_or_null(psnr_per_frame(sparse, dense)),
            "ssim": ssim(sparse, dense),
        }

    def write(
        self, folder: Path, *, fps: int | float, details: dict[str, Any]
    ) -> list[Path]:
        """Writes three videos, the picture of the kept share, and the report.

        Files of an earlier run in the folder are replaced or removed; see `RunFolder`.

        Args:
          folder: Folder to write to; made if it does not exist.
          fps: Frames per second of the videos.
          details: Entries to put in front of the report, such as the prompt.

        Returns:
          The files, the report last.

        Raises:
          MissingFilesError: After all files were tried, names those that failed.
        """
        with RunFolder(folder) as files:
            for name, writer in self.writers(fps=fps, details=details).items():
                files.write(name, writer)
        return files.written

    def writers(
        self, *, fps: int | float, details: dict[str, Any]
    ) -> dict[str, Callable[[Path], object]]:
        """Returns what writes each file that `write` does, by its name."""
        dense, sparse = self.dense.video[0], self.sparse.video[0]
        mp4 = functools.partial(functools.partial, video_io.write_mp4, fps=fps)

        def write_both(path: Path) -> None:
            both = video_io.side_by_side(dense, sparse)
            video_io.write_mp4(path, both, fps=fps)

        return {
            "dense.mp4": mp4(video=dense),
            "sparse.mp4": mp4(video=sparse),
            "side_by_side.mp4": write_both,
            KEPT_SHARE: lambda path: plots.plot_kept_share(
                path,
                self.sparse.kept_density,
                self.sparse.timesteps,
                title="sparse run",
                skipped=self.sparse.skipped,
                extra_work=self.sparse.extra_work,
            ),
            REPORT: lambda path: video_io.write_json(path, details | self.report()),
        }


def run_report(result: GenerationResult) -> dict[str, Any]:
    """Returns times and kept shares of one run, ready for strict JSON."""
    return {
        "time_ms_per_step": [round(float(value), 3) for value in result.time_ms],
        "time_ms_median_step": float(np.median(result.time_ms)),
        "time_ms_all_steps": float(result.time_ms.sum()),
        "compile_ms": result.compile_ms,
        "decode_ms": result.decode_ms,
        "timesteps": result.timesteps.tolist(),
        "dense_steps": result.work.count("dense"),
        "skipped_steps": result.work.count("skipped"),
        "work_per_step": list(result.work),
        "weight_only_steps": list(result.weight_only_steps),
        "stopped": result.stopped,
        "kept_share": float(result.kept_density.mean()),
        "work_share": result.work_share,
        "extra_work_of_a_sparse_layer": result.extra_work,
        "kept_share_per_layer": result.kept_density.mean(axis=0).tolist(),
        "kept_share_per_step_and_layer": result.kept_density.tolist(),
    }
