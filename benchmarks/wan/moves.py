"""Lists what a Wan2.1 program compiled for an H100 moves, on a machine without a GPU.

    PYTHONPATH=cuda PATH=cuda/nvidia/cu13/bin:$PATH \
        python -m benchmarks.wan.moves --output benchmarks/results/wan_moves_h100.json

`benchmarks.common.hopper_target` says what belongs in the folder `cuda`, and
`benchmarks.common.model_moves` what is listed. The program is one call of the 14B
transformer with draft attention, all sizes but the number of layers as published:
layers are a loop, so two have the program of forty.
"""

import dataclasses

from flax import nnx

from benchmarks.common.model_moves import Call, run, struct
from benchmarks.wan.run import latent_shape
from draft_jax import StepKind
from models.wan.config import WanConfig
from models.wan.inputs import WanInputs
from models.wan.transformer import WanTransformer

CONFIG = WanConfig.t2v_14b(num_layers=2)
KINDS = {
    "sparse, new masks": StepKind(dense=(False, False), refresh=True),
    "sparse, old masks": StepKind(dense=(False, False), refresh=False),
    "first layer dense": StepKind(dense=(True, False), refresh=True),
    "dense": StepKind(dense=(True, True), refresh=False),
}


def make_call(size: tuple[int, int], frames: int, linears: str) -> Call:
    """One call of the 14B transformer."""
    shape = latent_shape(size, frames)
    config = dataclasses.replace(CONFIG, linears=linears)
    text = (1, CONFIG.text_length, CONFIG.text_dim)
    return Call(
        model=nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0))),
        latent_shape=shape,
        inputs=WanInputs(
            latents=struct(1, *shape),
            timesteps=struct(1),
            context=struct(*text, dtype="bfloat16"),
            context_lengths=struct(1, dtype="int32"),
        ),
        channels=CONFIG.dim,
    )


if __name__ == "__main__":
    run(__doc__, make_call, KINDS, sizes=[(480, 832), (768, 1280)], frames=81)
