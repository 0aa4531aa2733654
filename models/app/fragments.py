"""Pieces of HTML of the page. Every text in them is escaped."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from models.app.files import files_in, url_of
from models.app.jobs import Job, JobState
from models.app.runner import data_url
from models.app.runs import EarlierRun, list_runs
from models.app.timing import Expected, Mode, in_words
from models.media.run_folder import PAGE

_FINISHED = {
    JobState.DONE: "Done",
    JobState.STOPPED: "Stopped",
    JobState.FAILED: "Failed",
}


def field_error(message: str | None) -> str:
    """Returns the message beside a field; nothing if it is right."""
    if message is None:
        return ""
    return f'<p class="dv-error" role="alert">{escape(message)}</p>'


def status_of(job: Job, before: Sequence[Job]) -> str:
    """Returns the state of a job, and how far it is.

    Args:
      job: The job.
      before: Jobs that must be over before it begins.
    """
    notes = "".join(f'<p class="dv-note">{escape(note)}</p>' for note in job.notes)
    if job.is_over:
        text = _FINISHED[job.state]
        if job.state is JobState.STOPPED:
            kept = "what was computed is kept" if job.folder else "nothing was computed"
            text += f": {kept}"
        if job.message:
            text += f": {job.message}"
        kind = "failed" if job.state is JobState.FAILED else "over"
        return f'<div class="dv-status dv-{kind}"><p>{escape(text)}</p>{notes}</div>'
    if job.state is JobState.WAITING:
        return f'<div class="dv-status"><p>{escape(_place(before))}</p></div>'
    return f'<div class="dv-status">{_progress(job)}{notes}</div>'


def message(text: str, kind: str = "note") -> str:
    """Returns a sentence in a box of its own; nothing if it is empty."""
    if not text:
        return ""
    return f'<div class="dv-status dv-{kind}"><p>{escape(text)}</p></div>'


def expected_time(mode: Mode, steps: int, expected: Expected | None) -> str:
    """Returns how many steps a request is, and how long they take."""
    runs = f"{steps} steps"
    if mode == "compare":
        runs = f"Two runs of {steps} steps, dense and then sparse"
    if expected is None:
        text = f"{runs}. How long they take is known after the first step."
    else:
        time = f"{expected.bound} {in_words(expected.seconds)}"
        text = f"{runs}: {time}, without compiling."
    return f'<p class="dv-expected">{escape(text)}</p>'


def result_of(outputs: Path, folder: Path) -> str:
    """Returns the report of a run, and links to its files."""
    files = list(files_in(folder))
    links = " ".join(
        f'<a href="{url_of(outputs, file)}" download>{escape(file.name)}</a>'
        for file in files
    )
    page = folder / PAGE
    if page in files:
        url = url_of(outputs, page)
        shown = frame(url)
        links = f'<a href="{url}" target="_blank">open in a tab</a> {links}'
    else:
        shown = "".join(
            f'<video controls loop muted src="{url_of(outputs, file)}"></video>'
            for file in files
            if file.suffix == ".mp4"
        )
    where = f'<p class="dv-where">{escape(str(folder))}</p>'
    return f'<div class="dv-result">{shown}<p class="dv-links">{links}</p>{where}</div>'


def frame(url: str) -> str:
    """Returns a frame that shows a report, as high as it is."""
    # Of the same origin, so its height can be read, again whenever it changes.
    fit = (
        "const frame=this,body=frame.contentDocument.body,"
        "fit=()=>{frame.style.height=body.scrollHeight+8+'px'};"
        "new ResizeObserver(fit).observe(body);fit()"
    )
    return f'<iframe src="{url}" title="Report" onload="{fit}"></iframe>'


def list_of(outputs: Path) -> str:
    """Returns a table of earlier runs."""
    runs = list_runs(outputs)
    if not runs:
        return message("There are no earlier runs in the outputs folder.")
    rows = "".join(map(_row, runs))
    head = "".join(
        f"<th>{name}</th>" for name in ("Prompt", "Video", "Attention", "Kept", "PSNR")
    )
    return (
        '<div class="dv-table"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(run: EarlierRun) -> str:
    report = run.report
    sampling = report.get("sampling", {})
    video = (
        f"{sampling.get('width')}x{sampling.get('height')}, "
        f"{sampling.get('frames')} frames, {sampling.get('num_steps')} steps, seed "
        f"{sampling.get('seed')}"
    )
    sparse = report.get("sparse", report)
    share = sparse.get("kept_share")
    kept = f"{100 * share:.0f} %" if isinstance(share, float | int) else ""
    decibel = report.get("psnr_db")
    quality = f"{decibel:.1f} dB" if isinstance(decibel, float | int) else ""
    kind = run.kind + (", stopped" if sparse.get("stopped") else "")
    cells = (str(report.get("prompt")), video, kind, kept, quality)
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _place(before: Sequence[Job]) -> str:
    count = len(before)
    runs = "1 run is" if count == 1 else f"{count} runs are"
    left = before[0].progress.seconds_left if before and before[0].progress else None
    time = "" if left is None else f"; the one that runs has {in_words(left)} left"
    return f"Place {count + 1} in line: {runs} before yours{time}."


def _progress(job: Job) -> str:
    progress = job.progress
    if progress is None:
        return "<p>Beginning</p>"
    parts = [progress.stage[:1].upper() + progress.stage[1:]]
    if progress.step:
        parts.append(f"step {progress.step} of {progress.num_steps}")
    if progress.kept_share is not None:
        parts.append(f"{100 * progress.kept_share:.0f} % of token pairs kept")
    if progress.seconds_left is not None:
        parts.append(f"{in_words(progress.seconds_left)} left")
    if job.wants_stop:
        parts.append("stopping after this step")
    most = max(progress.num_steps, 1)
    bar = f'<progress value="{progress.step}" max="{most}"></progress>'
    picture = ""
    if progress.preview is not None:
        url = data_url(progress.preview)
        picture = f'<img class="dv-preview" src="{url}" alt="Preview of the video">'
    return f"<p>{escape(' · '.join(parts))}</p>{bar}{picture}"
