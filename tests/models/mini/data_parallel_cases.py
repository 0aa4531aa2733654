"""Training on two simulated devices, in a process of its own.

    python -m tests.models.mini.data_parallel_cases

Prints a JSON object with what `test_data_parallel` asks for.
"""

import json
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np

from models.mini.compilation import Compiler
from models.mini.data_parallel import (
    SAME,
    SHARED,
    DataParallel,
    mean_gradients,
    own_key,
)
from models.mini.feed import Feed
from models.mini.scenes import Mix
from tests.collectives import collectives
from tests.models.mini.test_training import SIZE, make_trainer


def gradients(devices: DataParallel) -> dict:
    """The loss and its gradient of a linear model, and the numbers it was given."""
    rng = np.random.default_rng(0)
    weights, x, y = rng.normal(size=3), rng.normal(size=(6, 3)), rng.normal(size=6)

    def step(weights, x, y):
        return mean_gradients(lambda w: jnp.mean(jnp.square(x @ w - y)), weights)

    compiled = devices.jit(step, (SAME, SHARED, SHARED), (SAME, SAME))
    loss, gradient = compiled(weights, x, y)
    given = {"weights": weights.tolist(), "x": x.tolist(), "y": y.tolist()}
    return given | {"loss": float(loss), "gradient": gradient.tolist()}


def keys(devices: DataParallel) -> list[float]:
    """A number of each device's random stream."""
    draw = devices.jit(
        lambda key: jax.random.normal(own_key(key), (1,)), (SAME,), SHARED
    )
    return draw(jax.random.key(0)).tolist()


def training(devices: DataParallel) -> dict:
    """Steps of the small model, what they send, and whether devices stay equal."""
    trainer = make_trainer(devices)
    with Feed(0, parts=devices.count, workers=0) as feed:
        batch = trainer.batch(feed.get(0, lambda _: SIZE))
    state = trainer.initial_state()
    compiler = Compiler(trainer, state)
    compiler.start([SIZE])
    compiled = compiler.get(SIZE)
    losses = []
    for _ in range(40):
        state, loss = trainer.call(compiled, state, batch, 3e-3)
        losses.append(float(loss))
    copies = [
        [np.asarray(shard.data) for shard in leaf.addressable_shards]
        for leaf in jax.tree.leaves((state.parameters, state.ema))
    ]
    return {
        "losses": losses,
        "devices_of_each": [len(copy) for copy in copies],
        "equal": all((first == second).all() for first, second in copies),
        "sent": [len(collectives(program.as_text())) for program in compiled],
    }


def main() -> None:
    """Prints what was found."""
    Mix.of = lambda batch: Mix(procedural=0, pictures=batch - 1, clips=1)
    devices = DataParallel.of(2)
    found = {"gradients": gradients(devices), "keys": keys(devices)}
    print(json.dumps(found | {"training": training(devices)}))


if __name__ == "__main__":
    main()
