"""Runs the jobs of the page as `draft-video generate` runs its command."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import shutil
import statistics
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.app.form import USER_ERRORS, Form, FormError, message_of
from models.app.jobs import Job, Progress
from models.app.limits import Limits, free_memory_bytes
from models.app.runs import list_runs, reserve_folder
from models.app.timing import Expected, Mode, TimeBook
from models.cli.generate import make_run
from models.cli.messages import one_line, write_line
from models.cli.model import Request
from models.cli.outputs import run_name
from models.cli.report import device_details
from models.diffusion.dtypes import choose_linears
from models.diffusion.embeddings import GivenTextEncoder, UnknownPromptError
from models.diffusion.interfaces import TextEncoder
from models.diffusion.pipeline import VideoPipeline
from models.diffusion.results import StepReport, StopGeneration
from models.media.run_folder import RunFolder

UPLOADS = "uploads"  # folder of images, below that of outputs
MOST_IMAGE_PIXELS = 40_000_000
IMAGE_FORMATS = {"PNG": ".png", "JPEG": ".jpg"}
PREVIEWS = 8  # of a run, about
_PREVIEW_WIDTH = 640  # columns of pixels, at most


class Runner:
    """One model in memory, the folder that it writes to, and what is known of times.

    Args:
      model_options: Options of the model, as of the command line.
      outputs: The outputs folder.
      limits: Limits of a request.

    Attributes:
      form: Reads values of the page.
      outputs: The outputs folder.
      status: Where loading is, for people; "" once the model is there.
    """

    def __init__(
        self, *, model_options: tuple[str, ...] = (), outputs: Path, limits: Limits
    ):
        self.form = Form(model_options=model_options, check=self._check)
        self.outputs = outputs
        self.status = "The model is being loaded; runs can be asked for already."
        self._limits = limits
        self._knows_memory = limits.memory_bytes is not None
        self._pipeline: VideoPipeline | None = None
        self._linears: str | None = None  # of the one in memory
        self.defaults, self._request = self.form.defaults()
        self._times: TimeBook | None = None

    @property
    def model(self) -> Request:
        """The request of the model's own values; tells what the model can do."""
        return self._request

    def load(self) -> None:
        """Loads the model and learns the times of earlier runs."""
        try:
            self._load(self._request)
        except Exception as error:
            self.status = f"The model cannot be loaded: {one_line(message_of(error))}"
            raise
        details = self._request.details()
        hardware = details["hardware"] | device_details()
        self._times = TimeBook(details["checkpoint"], hardware)
        self._times.add(run.report for run in reversed(list_runs(self.outputs)))
        self.status = ""

    def _load(self, request: Request) -> VideoPipeline:
        """Returns the model as a request asks for it: loaded anew if it differs."""
        linears = request.arguments.linears
        if self._pipeline is None or linears != self._linears:
            self._pipeline = None  # one model in memory
            self._pipeline = request.load(any_prompt=True)
            self._linears = linears
            if not self._knows_memory:
                free = free_memory_bytes()
                self._limits = dataclasses.replace(self._limits, memory_bytes=free)
        return self._pipeline

    def expect(self, request: Request) -> Expected | None:
        """Returns the time that a run's steps take; None if not known."""
        if self._times is None:
            return None
        arguments = request.arguments
        mode: Mode = "compare" if arguments.compare else "sparse"
        if arguments.dense:
            mode = "dense"
        return self._times.expect(
            request.sampling,
            mode,
            linears=_chosen_linears(request),
            may_skip=request.cache is not None,
        )

    def store_image(self, path: Path) -> Path:
        """Copies an image below the outputs folder, so that a run can be made again.

        Returns:
          The copy, named after what is in it.

        Raises:
          FormError: It is no such image, or too large.
        """
        from PIL import Image

        try:
            with Image.open(path) as picture:
                kind, (width, height) = picture.format, picture.size
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:
            reason = "the image cannot be read: give a PNG or JPEG file"
            raise FormError({"image": reason}) from error
        if kind not in IMAGE_FORMATS:
            raise FormError({"image": f"the image is {kind}; give a PNG or JPEG file"})
        if width * height > MOST_IMAGE_PIXELS:
            raise FormError(
                {
                    "image": f"the image has {width}x{height} pixels; at most "
                    f"{MOST_IMAGE_PIXELS} are taken"
                }
            )
        name = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        stored = self.outputs / UPLOADS / f"{name}{IMAGE_FORMATS[kind]}"
        if not stored.exists():
            stored.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, stored)
        return stored

    def run(self, job: Job) -> bool:
        """Makes a job's videos; see `JobQueue`.

        Raises:
          Exception: The run failed. Its message is for people.
        """
        try:
            with _notes_to(job.notes):
                return self._run(job)
        except (*USER_ERRORS, UnknownPromptError, jax.errors.JaxRuntimeError) as error:
            raise RuntimeError(one_line(message_of(error))) from error
        except Exception as error:
            traceback.print_exc()
            kind = type(error).__name__
            raise RuntimeError(
                f"the run failed by a fault of the program ({kind}); its terminal says "
                "where"
            ) from error

    def _run(self, job: Job) -> bool:
        request: Request = job.work
        job.progress = Progress(stage="loading the model")
        pipeline = self._load(request)
        self._check(request)
        details = request.details()
        details["hardware"] |= device_details()
        details["linears"] = _chosen_linears(request)
        name = run_name(request.arguments, request.sampling, request.info.published)
        folder = reserve_folder(self.outputs, name)
        shown = _Shown(job, pipeline, self.expect(request))
        files = RunFolder(folder)
        try:
            make_run(files, pipeline, request, details, shown.progress)
        finally:
            if files.written:
                job.folder = folder
            else:
                with contextlib.suppress(OSError):  # nothing was written
                    folder.rmdir()
        assert self._times is not None
        reports = [
            run.report for run in list_runs(self.outputs) if run.folder == folder
        ]
        self._times.add(reports)
        return not shown.was_stopped

    def _check(self, request: Request) -> None:
        self._limits.check(request, self._pipeline)
        if self._pipeline is not None:
            _check_prompts(request, self._pipeline.text_encoder)


def _check_prompts(request: Request, encoder: TextEncoder | None) -> None:
    """Raises FormError for prompts that a file of embeddings lacks."""
    if not isinstance(encoder, GivenTextEncoder):
        return
    sampling = request.sampling
    texts = {"prompt": request.arguments.prompt}
    if sampling.guided:
        texts["negative_prompt"] = sampling.negative_prompt
    messages = {}
    for name, text in texts.items():
        try:
            encoder.encode([text])
        except UnknownPromptError as error:
            messages[name] = str(error)
    if messages:
        raise FormError(messages)


class _Shown:
    """Progress of a job's runs, and the place where it is stopped."""

    def __init__(self, job: Job, pipeline: VideoPipeline, expected: Expected | None):
        self.was_stopped = False
        self._job = job
        self._pipeline = pipeline
        self._has_previews = True
        self._runs_left = 2 if job.work.arguments.compare else 1
        self._show(Progress(stage="preparing", seconds_left=_seconds(expected)))

    @contextlib.contextmanager
    def progress(
        self, name: str, num_steps: int
    ) -> Iterator[Callable[[StepReport], None]]:
        """Shows each step of a run; see `models.cli.generate.Progress`."""
        before = self._job.progress
        self._show(
            Progress(
                stage=f"{name}: compiling",
                num_steps=num_steps,
                seconds_left=None if before is None else before.seconds_left,
            )
        )
        self._runs_left -= 1
        every = max(1, num_steps // PREVIEWS)
        preview: bytes | None = None
        times: list[float] = []

        def callback(report: StepReport) -> None:
            nonlocal preview
            last = report.index == num_steps - 1
            if self._job.wants_stop:
                if not last:
                    self.was_stopped = True
                    raise StopGeneration
            elif report.index % every == every - 1 and report.estimate is not None:
                preview = self._preview(report.estimate) or preview
            times.append(1e-3 * report.time_ms)
            # A run that comes after this one takes at most as long, dense or sparse.
            later = statistics.median(times) * num_steps * self._runs_left
            left = 1e-3 * report.time_left_ms + later
            self._show(
                Progress(
                    stage=name if not last else f"{name}: decoding and writing",
                    step=report.index + 1,
                    num_steps=num_steps,
                    kept_share=float(np.mean(report.kept_density)),
                    seconds_left=left,
                    preview=preview,
                )
            )

        yield callback

    def _preview(self, estimate: jax.Array) -> bytes | None:
        """Returns a picture; None, and none later, where the device has no memory."""
        if not self._has_previews:
            return None
        try:
            return _jpeg(self._pipeline.preview(estimate)[0])
        except jax.errors.JaxRuntimeError as error:
            self._has_previews = False
            self._job.notes.append(f"There is no preview: {one_line(error)}")
            return None

    def _show(self, progress: Progress) -> None:
        self._job.progress = progress


def _chosen_linears(request: Request) -> str:
    """Returns the precision as reports have it; the device is in use by now."""
    return choose_linears(request.arguments.linears)


def _seconds(expected: Expected | None) -> float | None:
    return None if expected is None else expected.seconds


def _jpeg(picture: np.ndarray) -> bytes:
    """Returns a picture with values in [0, 1] as JPEG, large enough to be looked at."""
    from PIL import Image

    image = Image.fromarray(np.round(255 * picture).astype(np.uint8))
    factor = max(1, _PREVIEW_WIDTH // 2 // image.width)
    image = image.resize((factor * image.width, factor * image.height))
    image.thumbnail((_PREVIEW_WIDTH, _PREVIEW_WIDTH))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def data_url(jpeg: bytes) -> str:
    """Returns a picture as the address of an `<img>`."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


_NOTES = threading.local()


@contextlib.contextmanager
def _notes_to(notes: list[str]) -> Iterator[None]:
    """Appends this thread's warnings to a list, which `hear_warnings` must allow."""
    _NOTES.heard = notes
    try:
        yield
    finally:
        _NOTES.heard = None


@contextlib.contextmanager
def hear_warnings() -> Iterator[None]:
    """Gives each warning to the thread that it is of; others become lines on stderr."""

    def show(message: Any, *rest: Any, **options: Any) -> None:
        heard = getattr(_NOTES, "heard", None)
        line = one_line(message)
        if heard is None:
            write_line(f"draft-video: note: {line}")
        elif line not in heard:
            heard.append(line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        yield
