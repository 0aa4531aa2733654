"""The page: a form, the state of its run, and earlier runs, made with Gradio."""

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from models.app import fragments
from models.app.files import url_of
from models.app.form import (
    CACHE_VALUES,
    CACHES,
    LINEARS,
    METHODS,
    MODES,
    PRESETS,
    SELECTIONS,
    SPARSITY,
    Abilities,
    FormError,
    FormValues,
    abilities_of,
)
from models.app.jobs import JobQueue, JobState, QueueFullError
from models.app.runner import Runner
from models.app.runs import list_runs
from models.app.timing import Mode
from models.cli import choices
from models.media.run_folder import PAGE
from models.report.writing import write_comparison

EXAMPLE = "a red ball bounces over a blue sea"  # that the shipped model knows
COMPARISONS = "comparisons"  # folder of pages of two runs, below that of outputs
_POLL_SECONDS = 0.3
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class _Fields:
    """The form's fields, each with a place for its message."""

    def __init__(self) -> None:
        self.components: dict[str, gr.components.Component] = {}
        self.errors: dict[str, gr.HTML] = {}

    def add(self, name: str, component: gr.components.Component) -> None:
        """Adds a component that was just made, and the place below it."""
        self.components[name] = component
        self.errors[name] = gr.HTML(visible=False, elem_id=f"error-{name or 'form'}")

    def values(self, given: tuple[Any, ...]) -> FormValues:
        """Returns the form's values, in the order of the components."""
        values = dict(zip(self.components, given, strict=True))
        image = values.get("image")
        values["image"] = None if image is None else Path(image)
        for name in ("prompt", "negative_prompt", "cache_values"):
            values[name] = values[name] or ""
        return FormValues(**values)

    def show(self, messages: dict[str, str]) -> dict[Any, Any]:
        """Returns updates that show these messages, and no others."""
        # A message of a field that this page does not have belongs to the whole form.
        named = {name if name in self.errors else "": m for name, m in messages.items()}
        return {
            place: gr.update(
                value=fragments.field_error(named.get(name)), visible=name in named
            )
            for name, place in self.errors.items()
        }


def build_page(runner: Runner, queue: JobQueue, *, upload_bytes: int) -> gr.Blocks:
    """Returns the page of a model.

    Args:
      runner: The model, and the outputs folder.
      queue: Where runs wait; its jobs are `runner`'s.
      upload_bytes: Most of an upload.
    """
    with gr.Blocks(title="draft-video", analytics_enabled=False) as page:
        gr.HTML(_head(runner))
        with gr.Tabs():
            with gr.Tab("Generate"):
                _build_generate(page, runner, queue, upload_bytes)
            with gr.Tab("Earlier runs") as earlier:
                _build_earlier(earlier, runner)
    return page


def _head(runner: Runner) -> str:
    checkpoint = runner.model.details()["checkpoint"]
    name = "the model that ships" if checkpoint == "shipped" else checkpoint
    return (
        '<div class="dv-head"><h1>Draft attention</h1>'
        f"<p>Videos by {escape(name)}, dense and sparse</p></div>"
    )


def _build_generate(
    page: gr.Blocks, runner: Runner, queue: JobQueue, upload_bytes: int
) -> None:
    fields = _Fields()
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            _add_prompt(fields, runner)
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", interactive=False, elem_id="stop")
            expected = gr.HTML(elem_id="expected")
            fields.errors[""] = gr.HTML(visible=False, elem_id="error-form")
            status = gr.HTML(fragments.message(runner.status), elem_id="status")
            _add_fields(fields, runner, upload_bytes)
        with gr.Column(scale=3, min_width=300):
            hint = "The videos of the run appear here."
            result = gr.HTML(fragments.message(hint), elem_id="result")

    inputs = list(fields.components.values())

    async def generate(request: gr.Request, *given: Any) -> AsyncIterator[dict]:
        try:
            values = fields.values(given)
            if values.image is not None:
                stored = runner.store_image(values.image)
                values = dataclasses.replace(values, image=stored)
            job = queue.submit(_owner(request), runner.form.read(values))
        except FormError as error:
            yield fields.show(error.messages)
            return
        except QueueFullError as error:
            yield fields.show({"": str(error)})
            return
        busy = {start: gr.update(interactive=False), stop: gr.update(interactive=True)}
        yield fields.show({}) | busy | {result: ""}
        shown = None
        while not job.is_over:
            job.touch()
            text = fragments.status_of(job, queue.before(job))
            if job.state is JobState.WAITING and runner.status:
                text += fragments.message(runner.status)
            # Also where nothing is new: that is how a page that is gone is noticed.
            yield {status: text if text != shown else gr.skip()}
            shown = text
            await asyncio.sleep(_POLL_SECONDS)
        made = ""
        if job.folder is not None:
            made = fragments.result_of(runner.outputs, job.folder)
        steps, time = job.work.sampling.num_steps, runner.expect(job.work)
        yield {
            expected: fragments.expected_time(values.mode, steps, time),
            status: fragments.status_of(job, []),
            result: made,
            start: gr.update(interactive=True),
            stop: gr.update(interactive=False),
        }

    start.click(
        generate,
        inputs,
        [expected, status, result, start, stop, *fields.errors.values()],
        concurrency_limit=None,
        **_QUIET,
    )

    def leave(request: gr.Request) -> None:
        queue.leave(_owner(request))

    stop.click(leave, queue=False, **_QUIET)
    page.unload(leave)
    _keep_up_to_date(page, runner, fields, expected, status)


def _keep_up_to_date(
    page: gr.Blocks, runner: Runner, fields: _Fields, expected: gr.HTML, status: gr.HTML
) -> None:
    """Says the expected time whenever it changes, and when the model is loaded."""
    inputs = list(fields.components.values())

    def say_expected(*given: Any) -> str:
        values = fields.values(given)
        try:
            request = runner.form.read(values)
        except FormError:
            return ""  # said when it is asked for
        steps, time = request.sampling.num_steps, runner.expect(request)
        return fragments.expected_time(values.mode, steps, time)

    timer = gr.Timer(1.0, active=bool(runner.status))

    def tick(*given: Any) -> tuple:
        if runner.status:
            return gr.skip(), gr.skip(), gr.skip()
        return gr.Timer(active=False), "", say_expected(*given)

    # Also when a page is opened again, whose timer was made before the model was there.
    page.load(say_expected, inputs, expected, queue=False, **_QUIET)
    timer.tick(tick, inputs, [timer, status, expected], queue=False, **_QUIET)
    for name in ("mode", "width", "height", "frames", "steps", "guidance", "cache"):
        fields.components[name].change(
            say_expected,
            inputs,
            expected,
            queue=False,
            trigger_mode="always_last",
            **_QUIET,
        )


def _add_prompt(fields: _Fields, runner: Runner) -> None:
    shipped = runner.model.arguments.checkpoint is None
    prompt = gr.Textbox(
        EXAMPLE if shipped else "", label="Prompt", lines=2, elem_id="prompt"
    )
    fields.add("prompt", prompt)


def _add_fields(fields: _Fields, runner: Runner, upload_bytes: int) -> None:
    """Makes the other fields, with the model's own values."""
    values, can = runner.defaults, abilities_of(runner.model)
    if can.image is None:
        size = f"{upload_bytes / 2**20:.3g} MiB"
        image = gr.Image(
            label=f"First frame: a PNG or JPEG of at most {size}",
            type="filepath",
            sources=["upload"],
            height=180,
            elem_id="image",
        )
        # Gradio would open the file: of one that is no picture it makes a traceback.
        image.preprocess = _path_of  # type: ignore[method-assign]
        fields.add("image", image)
    else:
        gr.HTML(_disabled("First frame", can.image), elem_id="no-image")
    fields.add(
        "mode",
        gr.Radio(
            [(f"{name.capitalize()}: {MODES[name]}", name) for name in get_args(Mode)],
            value="compare",
            label="What to make",
            elem_classes="dv-choices",
        ),
    )
    fields.add(
        "sparsity",
        gr.Slider(0, 0.99, values.sparsity, step=0.01, label="Sparsity", info=SPARSITY),
    )
    with gr.Accordion("Which blocks are kept, and where", open=False):
        _add_draft_fields(fields, values, can.published)
    with gr.Accordion("Skipped steps and precision", open=False):
        _add_speed_fields(fields, values, can)
    with gr.Accordion("Video", open=True):
        _add_video_fields(fields, values)


def _path_of(uploaded: Any) -> str | None:
    """Returns the path of an upload, which Gradio has found among its own."""
    return None if uploaded is None else uploaded.path


def _add_draft_fields(
    fields: _Fields, values: FormValues, no_published: str | None
) -> None:
    method = _choice("Blocks that are not kept", METHODS, values.method)
    fields.add("method", method)
    selection = _choice("Selection", SELECTIONS, values.selection)
    fields.add("selection", selection)
    # Each has a sparsity and a selection of its own.
    draft, paper = choices.DraftDefaults(), choices.PaperDefaults()
    settings = {
        "compensated": (draft.sparsity, draft.selection),
        "paper": (paper.sparsity, paper.selection),
    }
    method.change(
        settings.get,
        method,
        [fields.components["sparsity"], selection],
        queue=False,
        **_QUIET,
    )
    top_p = gr.Slider(
        0.01,
        1,
        values.top_p,
        step=0.01,
        label="Mass to keep",
        info="Read by the selection top_p only.",
        interactive=False,
    )
    fields.add("top_p", top_p)
    fields.components["selection"].change(
        lambda selection: gr.update(interactive=selection == "top_p"),
        fields.components["selection"],
        top_p,
        queue=False,
        **_QUIET,
    )
    preset = _choice("Preset", PRESETS, values.preset, not_all=no_published)
    fields.add("preset", preset)


def _add_speed_fields(fields: _Fields, values: FormValues, can: Abilities) -> None:
    rules: dict[Any, str] = dict(CACHES)
    if can.mag is not None:
        del rules["mag"]
    cache = _choice("Step cache", rules, values.cache)
    fields.add("cache", cache)
    if can.mag is not None:
        gr.HTML(_disabled("mag", can.mag), elem_id="no-mag")
    constants = gr.Textbox(
        values.cache_values,
        label="Constants of the step cache",
        info=CACHE_VALUES,
        interactive=False,
        elem_id="cache_values",
    )
    fields.add("cache_values", constants)
    cache.change(
        lambda chosen: gr.update(interactive=chosen != "off"),
        cache,
        constants,
        queue=False,
        **_QUIET,
    )
    label = "Linear layers (another choice loads the model anew)"
    linears = _choice(label, LINEARS, values.linears, not_all=can.float8)
    fields.add("linears", linears)


def _choice(
    label: str, texts: Mapping[Any, str], value: str, *, not_all: str | None = None
) -> gr.Radio:
    """Returns choices with a sentence each; a reason that disables them is shown."""
    return gr.Radio(
        [(f"{name}: {text}", name) for name, text in texts.items()],
        value=value,
        label=label,
        info=not_all,
        interactive=not_all is None,
        elem_id=label.split(" (")[0].lower().replace(" ", "-"),
        elem_classes="dv-choices",
    )


def _add_video_fields(fields: _Fields, values: FormValues) -> None:
    with gr.Row():
        for name in ("width", "height", "frames", "steps"):
            with gr.Column(min_width=120):
                number = gr.Number(
                    getattr(values, name), label=name.capitalize(), elem_id=name
                )
                fields.add(name, number)
    with gr.Row():
        for name, info in (
            ("guidance", "Strength of the prompt; 1 turns it off."),
            ("seed", "The same seed makes the same video."),
        ):
            with gr.Column(min_width=120):
                number = gr.Number(
                    getattr(values, name),
                    label=name.capitalize(),
                    info=info,
                    elem_id=name,
                )
                fields.add(name, number)
    fields.add(
        "negative_prompt",
        gr.Textbox(
            values.negative_prompt,
            label="Negative prompt",
            info="What guidance leads away from; not read where guidance is 1.",
        ),
    )


def _build_earlier(tab: gr.Tab, runner: Runner) -> None:
    table = gr.HTML(elem_id="runs")
    with gr.Row():
        first = gr.Dropdown([], label="A run", elem_id="first-run")
        second = gr.Dropdown([], label="Another run", elem_id="second-run")
    with gr.Row():
        show = gr.Button("Show the first", elem_id="show-run")
        compare = gr.Button("Compare the two", variant="primary", elem_id="compare")
    wrong = gr.HTML(visible=False, elem_id="error-runs")
    result = gr.HTML(elem_id="earlier-result")

    def refresh() -> tuple:
        choices = [(run.title, run.name) for run in list_runs(runner.outputs)]
        update = gr.update(choices=choices)
        return fragments.list_of(runner.outputs), update, update

    def folder_of(name: str | None, what: str) -> Path:
        # By the list, so that a name leads to a run and nowhere else.
        for run in list_runs(runner.outputs):
            if run.name == name:
                return run.folder
        raise FormError({"": f"choose {what} from the list"})

    def show_one(name: str | None) -> tuple:
        try:
            folder = folder_of(name, "a run")
        except FormError as error:
            return _wrong(str(error)), ""
        return _right(), fragments.result_of(runner.outputs, folder)

    def show_two(name: str | None, other: str | None) -> tuple:
        try:
            folders = folder_of(name, "a run"), folder_of(other, "another run")
            if folders[0] == folders[1]:
                raise FormError({"": "choose two runs that are not the same"})
            page = _comparison(runner.outputs, *folders)
        except (ValueError, OSError) as error:
            return _wrong(str(error)), ""
        url = url_of(runner.outputs, page)
        return _right(), f'<div class="dv-result">{fragments.frame(url)}</div>'

    tab.select(refresh, None, [table, first, second], queue=False, **_QUIET)
    show.click(show_one, first, [wrong, result], **_QUIET)
    compare.click(show_two, [first, second], [wrong, result], **_QUIET)


def _comparison(outputs: Path, first: Path, second: Path) -> Path:
    """Writes the page of two runs, and returns it."""
    names = "\n".join(
        folder.relative_to(outputs).as_posix() for folder in (first, second)
    )
    name = hashlib.sha256(names.encode()).hexdigest()[:16]
    page = outputs / COMPARISONS / name / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(page, first, second)
    return page


def _wrong(text: str) -> Any:
    return gr.update(value=fragments.field_error(text), visible=True)


def _right() -> Any:
    return gr.update(value="", visible=False)


def _disabled(label: str, reason: str) -> str:
    return (
        f'<p class="dv-reason"><strong>{label}</strong>, not for this model: '
        f"{escape(reason)}</p>"
    )


def _owner(request: gr.Request) -> str:
    """Returns the name of the page that sends a request."""
    return str(request.session_hash)
