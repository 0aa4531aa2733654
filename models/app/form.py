"""The form's values, and the request of the command line that they stand for.

A form is checked as its command would be: the options are parsed and read by the same
functions, so what one refuses the other does, too, and in the same words.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.app.timing import Mode
from models.cli import choices, options
from models.cli.cache_options import CacheRequest
from models.cli.caching import cache_from
from models.cli.generate import read_run
from models.cli.model import Request, read_model
from models.cli.parser import UsageError, build_parser
from models.diffusion.dtypes import check_linears
from models.diffusion.embeddings import UnknownPromptError

Number = int | float | None  # of a field; None where it is empty
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
NO_PROMPT = "any video"  # stands in where only other fields are checked

_DRAFT = choices.DraftDefaults()

MODES: dict[Mode, str] = {
    "compare": "Dense and sparse from the same noise, to see what sparsity costs.",
    "sparse": "Draft attention only.",
    "dense": "Full attention on every step.",
}
SPARSITY = (
    "Share of block pairs that sparse steps skip. 0 is the dense video; 0.9 is a good "
    "start where means stand for the rest, 0.75 where nothing does."
)
SELECTIONS = {
    "percentile": "All pairs of a head are ranked together: heads spend their budget "
    "where the draft is strong. The paper's.",
    "row_topk": "Each block keeps the same number of others: even, and the best one on "
    "the model that ships.",
    "top_p": "Each block keeps the fewest others that hold the mass below: the work "
    "follows the content, and sparsity bounds it.",
}
METHODS = {
    "compensated": "Blocks that are not kept take part through means of their keys and "
    "values, and a few exact rows correct the rest, which adds a little work; those "
    "are kept that means stand worst for.",
    "paper": "Blocks that are not kept take no part. The paper's.",
}
CACHES = {
    "off": "Every step is computed.",
    "easy": "Steps that would change little are skipped, told by the latents.",
    "mag": "Steps are skipped by ratios that were measured on the model.",
}
CACHE_VALUES = (
    "Empty for the usual ones. easy: threshold, first steps that are computed "
    "(0.05,10); mag: threshold, most skips in a row, first share that is computed "
    "(0.12,2,0.2)."
)
LINEARS = {
    "bfloat16": "The model's own; float32 on a CPU.",
    "float8": "Half the memory of weights, and faster on Hopper and Ada GPUs; slow on "
    "a CPU.",
    "auto": "float8 on GPUs that are faster with it, else the model's own.",
}
PRESETS = {
    "paper": "The first quarter of the steps is dense, as in the paper.",
    "published": "Dense where the published code for this model is: above a noise "
    "level, and in some layers.",
}


class FormError(ValueError):
    """Values that were refused.

    Attributes:
      messages: What is wrong with each field, by its name; "" is the whole form.
    """

    def __init__(self, messages: dict[str, str]):
        self.messages = messages
        super().__init__("; ".join(messages.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormValues:
    """Values as the page has them; a number is None where its field is empty.

    Attributes:
      prompt: What the video shows.
      negative_prompt: What guidance leads away from.
      image: The first frame; a file.
      mode: Which runs are made.
      sparsity: Share of block pairs to skip.
      selection: How blocks are chosen.
      top_p: Mass to keep, for the selection "top_p".
      method: Whether means stand for blocks that are not kept.
      preset: Where attention stays dense.
      cache: Rule of the step cache.
      cache_values: Its constants, with commas between.
      linears: Precision of the transformer's linear layers.
      width: Columns of pixels.
      height: Rows of pixels.
      frames: Frames of the video.
      steps: Steps of the sampler.
      guidance: Strength of classifier-free guidance.
      seed: Of the noise.
    """

    prompt: str
    negative_prompt: str = ""
    image: Path | None = None
    mode: Mode = "compare"
    sparsity: Number = _DRAFT.sparsity
    selection: str = _DRAFT.selection
    top_p: Number = _DRAFT.top_p
    method: str = choices.METHODS[0]
    preset: str = "paper"
    cache: str = "off"
    cache_values: str = ""
    linears: str = "bfloat16"
    width: Number
    height: Number
    frames: Number
    steps: Number
    guidance: Number
    seed: Number


WHOLE_NUMBERS = ("width", "height", "frames", "steps", "seed")
NUMBERS = (*WHOLE_NUMBERS, "guidance", "sparsity", "top_p")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """What a page can ask of one model.

    Args:
      model_options: Options of the model, such as ("--checkpoint", "FOLDER").
      check: Checks a request further, such as against limits; raises `FormError`.
    """

    model_options: tuple[str, ...] = ()
    check: Callable[[Request], None] = lambda request: None

    def command(self, values: FormValues) -> list[str]:
        """Returns the arguments of `draft-video` that make what the values say."""
        _check_numbers(values)
        # With "=", for a value may begin with a dash.
        given = [f"--seed={_text(values.seed)}", f"--steps={_text(values.steps)}"]
        given.append(f"--size={_text(values.width)}x{_text(values.height)}")
        given.append(f"--frames={_text(values.frames)}")
        given.append(f"--guidance={_text(values.guidance)}")
        if values.negative_prompt:
            given.append(f"--negative-prompt={values.negative_prompt}")
        if values.image is not None:
            given.append(f"--image={values.image}")
        if values.mode == "dense":
            given.append("--dense")
        else:
            given.append(f"--sparsity={_text(values.sparsity)}")
            given += [f"--method={values.method}", f"--selection={values.selection}"]
            given.append(f"--preset={values.preset}")
            if values.selection == "top_p":
                given.append(f"--top-p={_text(values.top_p)}")
        if values.mode == "compare":
            given.append("--compare")
        if values.cache != "off":
            colon = ":" if values.cache_values.strip() else ""
            given.append(f"--cache={values.cache}{colon}{values.cache_values.strip()}")
        if values.linears != self._linears:
            given.append(f"--linears={values.linears}")
        return ["generate", *self.model_options, *given, "--", values.prompt]

    def read(self, values: FormValues) -> Request:
        """Returns the request that the values stand for.

        Raises:
          FormError: Names the fields that are wrong.
        """
        try:
            request = self._read(values)
            self.check(request)
        except FormError:
            raise
        except (*USER_ERRORS, UnknownPromptError, UsageError) as error:
            raise FormError(self._blame(values, message_of(error))) from error
        return request

    def defaults(self, *, prompt: str = "") -> tuple[FormValues, Request]:
        """Returns the model's own values, and the request that they are.

        The request is without an image, also of a model that needs one.

        Raises:
          ValueError: The model's options are wrong.
        """
        arguments = parse(["generate", *self.model_options, "--", NO_PROMPT])
        request = read_model(arguments)
        sampling = request.sampling
        values = FormValues(
            prompt=prompt,
            negative_prompt=sampling.negative_prompt,
            width=sampling.width,
            height=sampling.height,
            frames=sampling.frames,
            steps=sampling.num_steps,
            guidance=sampling.guidance,
            seed=sampling.seed,
            linears=self._linears,
        )
        return values, request

    @functools.cached_property
    def _linears(self) -> str:
        """Precision that the model's options ask for."""
        parsed = parse(["generate", *self.model_options, "--", NO_PROMPT])
        return parsed.linears

    def _read(self, values: FormValues) -> Request:
        return read_run(parse(self.command(values)))

    def _blame(self, values: FormValues, message: str) -> dict[str, str]:
        """Returns which fields are wrong: those that are so among the defaults, too."""
        defaults, _ = self.defaults(prompt=NO_PROMPT)
        base = dataclasses.replace(defaults, image=values.image, mode=values.mode)
        if (reason := self._why_wrong(base)) is not None:
            wrong_image = values.image is not None or "image" in reason
            return {"image" if wrong_image else "": reason}
        messages = {}
        for field in dataclasses.fields(FormValues):
            given = getattr(values, field.name)
            with_it = {"cache": values.cache} if field.name == "cache_values" else {}
            changed = dataclasses.replace(base, **with_it | {field.name: given})
            if "cache" in messages and with_it:
                continue  # the rule is to blame, whatever its constants
            if (reason := self._why_wrong(changed)) is not None:
                messages[field.name] = reason
        return messages or {"": message}

    def _why_wrong(self, values: FormValues) -> str | None:
        try:
            self._read(values)
        except (*USER_ERRORS, UnknownPromptError, UsageError) as error:
            return message_of(error)
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abilities:
    """Why parts of the form mean nothing to a model; None where they do.

    Attributes:
      image: Reason why no image can be given.
      published: Reason why there is no published preset.
      mag: Reason why steps cannot be skipped by ratios.
      float8: Reason why linear layers cannot be in FP8.
    """

    image: str | None
    published: str | None
    mag: str | None
    float8: str | None


def abilities_of(request: Request) -> Abilities:
    """Returns what a model can do, by the checks of the command line."""
    published = argparse.Namespace(preset="published")
    asked = {"cache": CacheRequest("mag"), "cache_ratios": None}
    mag = argparse.Namespace(**vars(request.arguments) | asked)
    apart = request.family.text_beside_jax
    return Abilities(
        image=_reason(lambda: request.info.conditioning.check_image(given=True)),
        published=_reason(
            lambda: options.check_preset(published, request.info.published)
        ),
        mag=_reason(lambda: cache_from(mag, request.info, request.sampling)),
        float8=_reason(lambda: check_linears("float8", apart=apart)),
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns parsed arguments of `draft-video`, as the command has them.

    Raises:
      UsageError: They are wrong.
    """
    parsed = build_parser().parse_args(arguments)
    parsed.argv = list(arguments)
    return parsed


def message_of(error: BaseException) -> str:
    """Returns what an error says to people."""
    text = error.message if isinstance(error, UsageError) else str(error)
    return text or type(error).__name__


def _reason(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _check_numbers(values: FormValues) -> None:
    messages = {}
    for name in NUMBERS:
        value = getattr(values, name)
        whole = name in WHOLE_NUMBERS
        if isinstance(value, bool) or not isinstance(value, int | float):
            messages[name] = f"{name} is missing: give a number"
        elif not math.isfinite(value):
            messages[name] = f"{name}={value} must be a finite number"
        elif whole and value != int(value):
            messages[name] = f"{name}={value:g} must be a whole number"
    if messages:
        raise FormError(messages)


def _text(value: Number) -> str:
    """Returns a number as one types it."""
    assert value is not None  # checked before
    return str(int(value)) if value == int(value) else repr(float(value))
