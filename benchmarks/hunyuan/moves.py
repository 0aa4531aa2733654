"""Lists what a HunyuanVideo program compiled for an H100 moves, without a GPU.

    PYTHONPATH=cuda PATH=cuda/nvidia/cu13/bin:$PATH python -m benchmarks.hunyuan.moves \
        --output benchmarks/results/hunyuan_moves_h100.json

`benchmarks.common.hopper_target` says what belongs in the folder `cuda`, and
`benchmarks.common.model_moves` what is listed. The program is one call of the 13B
transformer with draft attention, as published.
"""

import dataclasses

from flax import nnx

from benchmarks.common.model_moves import Call, run, struct
from benchmarks.hunyuan.run import MODELS, latent_shape
from draft_jax import StepKind
from models.hunyuan.inputs import HunyuanInputs
from models.hunyuan.transformer import HunyuanTransformer

CONFIG = MODELS["13b"]
LAYERS = range(CONFIG.num_layers)
KINDS = {
    "sparse, new masks": StepKind(dense=(False,) * len(LAYERS), refresh=True),
    "published": StepKind(dense=tuple(n < 2 for n in LAYERS), refresh=True),
    "dense": StepKind(dense=(True,) * len(LAYERS), refresh=False),
}


def make_call(size: tuple[int, int], frames: int, linears: str) -> Call:
    """One call of the 13B transformer."""
    shape = latent_shape(size, frames)
    config = dataclasses.replace(CONFIG, linears=linears)
    text = (1, CONFIG.text_length)
    return Call(
        model=nnx.eval_shape(lambda: HunyuanTransformer(config, rngs=nnx.Rngs(0))),
        latent_shape=shape,
        inputs=HunyuanInputs(
            latents=struct(1, *shape),
            timesteps=struct(1),
            context=struct(*text, CONFIG.text_dim, dtype="bfloat16"),
            context_mask=struct(*text, dtype="bool"),
            pooled=struct(1, CONFIG.pooled_dim),
            guidance=struct(1),
        ),
        channels=CONFIG.dim,
    )


if __name__ == "__main__":
    run(__doc__, make_call, KINDS, sizes=[(768, 1280), (720, 1280)], frames=129)
