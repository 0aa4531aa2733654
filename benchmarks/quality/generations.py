"""Generations of clips: dense steps once for all methods, programs compiled ahead.

The first steps are dense whatever the method, so they are run once and every method
goes on from there. Programs are compiled by threads while others run; each serves all
densities of a method. Videos stay on the device, where they are compared.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from benchmarks.quality.clips import Clips
from benchmarks.quality.trials import DenseKernel
from draft_jax import AttentionPlan
from models.diffusion.caches import StepCache
from models.diffusion.decoding import check_codec_output
from models.diffusion.pipeline import DENSE, VideoPipeline
from models.diffusion.results import StepReport
from models.diffusion.sampler import Sampler
from models.diffusion.sampling import Sampling
from models.diffusion.step_programs import (
    SKIPPED,
    Program,
    SamplerState,
    StepInputs,
)
from models.float8.product import compiler_options
from pallas_kernels.attention import dense_api
from pallas_kernels.attention.dense_api import BackendChoice

MOST_AT_ONCE = 8  # programs that are compiled
TRACING = threading.Lock()  # one program is traced at a time


class Begun(NamedTuple):
    """Where the dense first steps of a batch of clips have led to.

    Attributes:
      step: The step that comes next.
      latents: Latents before it.
      history: The solver's.
    """

    step: int
    latents: Float[Array, "B F H W C"]
    history: Any


class Generation(NamedTuple):
    """Videos of clips, and how they came about.

    Attributes:
      videos: Values in [0, 1], on the device.
      reports: Of the steps that were run, of each batch.
      begun: Of each batch; only where all steps were run.
      seen: Latents before the steps that are looked at, by step, of all clips; only of
        dense generations.
    """

    videos: Float[Array, "B T Y X 3"]
    reports: list[list[StepReport]]
    begun: list[Begun]
    seen: dict[int, Float[Array, "B F H W C"]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What clips are generated with.

    Attributes:
      pipeline: The model.
      attention: Dense attention, or a method with its schedule.
      cache: Rule of a step cache.
      first_step: Steps before it were run already.
      dense_kernel: What dense attention is computed by, in place of the library's
        choice.
    """

    pipeline: VideoPipeline
    attention: AttentionPlan = DENSE
    cache: StepCache | None = None
    first_step: int = 0
    dense_kernel: DenseKernel | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Generations:
    """Generates clips with settings that are the same for all.

    Attributes:
      sampling: Size, length and steps of the videos.
      first_sparse: The first step that methods are told apart in.
      looked_at: Steps whose layers are looked at.
      threads: Where programs are compiled.
    """

    sampling: Sampling
    first_sparse: int
    looked_at: tuple[int, ...]
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)
    threads: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(
            compiled_at_once()
        ),
        repr=False,
    )

    def prepare(self, work: Work, clips: Clips) -> None:
        """Begins to compile what a generation needs, if nothing has yet."""
        for batch in {len(each.prompts): each for each in clips.batches()}.values():
            self._compiling(work, batch)

    def stop(self) -> None:
        """Gives up what was not begun to compile."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def dense(self, pipeline: VideoPipeline, clips: Clips) -> Generation:
        """Generates dense videos, and keeps what methods and looks go on from."""
        return self._generate(Work(pipeline=pipeline), clips, None, self.looked_at)

    def go_on(self, work: Work, clips: Clips, begun: Sequence[Begun]) -> Generation:
        """Generates videos from where the dense steps have led to."""
        return self._generate(work, clips, begun)

    def whole(self, work: Work, clips: Clips) -> Generation:
        """Generates videos from noise, all steps by the same rule."""
        return self._generate(work, clips, None)

    def _generate(
        self,
        work: Work,
        clips: Clips,
        begun: Sequence[Begun] | None,
        looked_at: Sequence[int] = (),
    ) -> Generation:
        videos, reports, left_at = [], [], []
        seen: dict[int, list[Array]] = {step: [] for step in looked_at}
        for place, batch in enumerate(clips.batches()):
            programs = self._compiling(work, batch).result()
            sampler, state, inputs = self._start(work, batch)
            if begun is not None:
                state = _from(state, begun[place])
            found: list[StepReport] = []
            for index in range(work.first_step, self.sampling.num_steps):
                if begun is None and index == self.first_sparse:
                    latents, history = _copies((state.latents, state.history))
                    left_at.append(Begun(index, latents, history))
                if index in seen:
                    seen[index].append(_copies(state.latents))
                state, report = sampler.run_step(programs, state, inputs, index)
                found.append(dataclasses.replace(report, estimate=None))
            reports.append(found)
            latents = state.latents
            del state, inputs  # the decoder needs memory
            videos.append(decode(work.pipeline, latents))
        joined = {step: jnp.concatenate(parts) for step, parts in seen.items()}
        return Generation(jnp.concatenate(videos), reports, left_at, joined)

    def _start(
        self, work: Work, batch: Clips
    ) -> tuple[Sampler, SamplerState, StepInputs]:
        shape = work.pipeline.latent_shape(self.sampling)
        return work.pipeline.start(
            batch.texts,
            self.sampling,
            noise=batch.noise(shape, self.sampling.seed),
            attention=work.attention,
            cache=work.cache,
        )

    def _compiling(
        self, work: Work, batch: Clips
    ) -> concurrent.futures.Future[dict[Program, Callable]]:
        """Returns the programs of a generation, now or later."""
        sampler = Sampler.create(
            work.pipeline.model,
            latent_shape=work.pipeline.latent_shape(self.sampling),
            solver=self.sampling.make_solver(),
            attention=work.attention,
            cache=work.cache,
            experts=work.pipeline.experts,
            low_guidance=self.sampling.low_guidance,
            boundary=self.sampling.boundary,
            weight_only_steps=work.pipeline.weight_only_steps,
        )
        kinds: list[Program] = [
            sampler.program(index, skip=False, owes_masks=False)[0]
            for index in range(work.first_step, self.sampling.num_steps)
        ]
        if work.cache is not None:  # whichever steps its constants skip
            kinds += [SKIPPED, *sampler.kinds]
        kinds = list(dict.fromkeys(kinds))
        key = (
            id(work.pipeline),
            work.attention.config,
            type(work.cache),  # its constants are read on the host
            len(batch.prompts),
            tuple(kinds),
            work.dense_kernel,
        )
        if key not in self._programs:
            # A state of its own: that of a run is given up by its first step.
            _, state, inputs = self._start(work, batch)
            self._programs[key] = self.threads.submit(
                _compile, sampler, (state, inputs), kinds, work.dense_kernel
            )
        return self._programs[key]


def compiled_at_once() -> int:
    """Returns how many programs are compiled side by side: one for two cores."""
    return min(MOST_AT_ONCE, max(2, (os.cpu_count() or 1) // 2))


def _compile(
    sampler: Sampler,
    start: tuple[SamplerState, StepInputs],
    kinds: list[Program],
    dense_kernel: DenseKernel | None,
) -> dict[Program, Callable]:
    with TRACING, dense_attention_by(dense_kernel):
        lowered = sampler.lower(*start, kinds)
    options = compiler_options(nnx.state(sampler.model))
    return {
        kind: step.compile(compiler_options=options) for kind, step in lowered.items()
    }


@contextlib.contextmanager
def dense_attention_by(kernel: DenseKernel | None) -> Iterator[None]:
    """Makes dense attention that is traced meanwhile take a kernel, not the fastest.

    None leaves the choice to the library.
    """
    with contextlib.ExitStack() as stack:
        if kernel is not None:
            choice = BackendChoice(name=kernel, reason="the lab compares kernels")
            patch = mock.patch.object(dense_api, "choose", return_value=choice)
            stack.enter_context(patch)
        yield


def _from(state: SamplerState, begun: Begun) -> SamplerState:
    latents, history = _copies((begun.latents, begun.history))
    return state._replace(latents=latents, history=history)


def _copies(arrays: Any) -> Any:
    """Returns arrays of their own, as a step gives up the memory of its state."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), arrays)


def decode(
    pipeline: VideoPipeline, latents: Float[Array, "B F H W C"]
) -> Float[Array, "B T Y X 3"]:
    """Returns videos in [0, 1] on the device.

    Raises:
      FloatingPointError: What the codec makes is not finite.
    """
    video = jnp.asarray(pipeline.codec.decode(latents), jnp.float32)
    check_codec_output("video that the codec decoded", video)
    return jnp.clip(0.5 * (video + 1.0), 0.0, 1.0)


def counts_of_steps(reports: Sequence[StepReport]) -> dict[str, int]:
    """Returns how many steps were dense, sparse and skipped."""
    works = [report.work for report in reports]
    return {work: works.count(work) for work in ("dense", "sparse", "skipped")}


def steps_ms(generation: Generation) -> list[float]:
    """Returns milliseconds of the steps of each batch, without compiling."""
    return [
        round(sum(report.time_ms for report in reports), 1)
        for reports in generation.reports
    ]


def kept_density(generation: Generation) -> float:
    """Returns the share of block pairs that sparse steps kept; 1 without any."""
    shares = [
        report.kept_density.mean()
        for reports in generation.reports
        for report in reports
        if report.work == "sparse"
    ]
    return float(np.mean(shares)) if shares else 1.0
