"""Step caches of trials: a rule, and the ratios that MagCache goes by."""

from collections.abc import Callable

from benchmarks.caches.run import make_cache
from draft_jax import AttentionPlan
from models.cli.cache_options import parse_cache
from models.diffusion.caches import MagRatios, StepCache
from models.diffusion.caches.mag import describe_attention
from models.diffusion.sampling import Sampling


def cache_of(rule: str | None, ratios: Callable[[], MagRatios]) -> StepCache | None:
    """Returns the step cache of a rule.

    Args:
      rule: As on the command line; None for no cache.
      ratios: Returns those of MagCache; called if the rule needs them.
    """
    if rule is None:
        return None
    request = parse_cache(rule)
    return make_cache(request, ratios() if request.rule == "mag" else None)


def flat_ratios(sampling: Sampling, attention: AttentionPlan) -> MagRatios:
    """Returns ratios to compile with, before any are measured: all are 1.

    The host reads them, and no program depends on them.
    """
    return MagRatios(
        values=((1.0,) * sampling.num_steps,),
        model="any",
        source="none was measured",
        attention=describe_attention(attention),
    )
