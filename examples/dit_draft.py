"""A small video diffusion transformer (DiT) in Flax NNX, and one step of sampling."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from draft_jax import DraftConfig, VideoGrid, draft_attention

GRID = (4, 16, 32)  # frames, rows, columns of tokens: 2,048 tokens
CHANNELS, WIDTH, HEADS, BLOCKS = 16, 128, 2, 2
DRAFT = DraftConfig(sparsity=0.9)  # 90 % of the block pairs are not computed exactly


def rotate(x, grid):
    """Turns channels by frame, row and column: a rotary embedding (RoPE)."""
    places = jnp.stack(jnp.indices(grid), -1).reshape(-1, 3, 1)
    rates = 1e4 ** -jnp.linspace(0, 1, x.shape[-1] // 6)
    angles = (places * rates).reshape(len(places), 1, -1)
    first, second, rest = jnp.split(x, [angles.shape[-1], 2 * angles.shape[-1]], -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate([*turned, rest], -1)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, grid):
        q, k, v = rearrange(self.qkv(x), "B T (s N D) -> s B T N D", s=3, N=HEADS)
        q, k = rotate(q, grid), rotate(k, grid)
        out = draft_attention(q, k, v, grid=VideoGrid(*grid), config=DRAFT)
        return self.out(rearrange(out, "B T N D -> B T (N D)"))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, use_scale=False, use_bias=False, rngs=rngs)
        self.modulation = nnx.Linear(1, 6 * WIDTH, rngs=rngs)
        self.attention = Attention(rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, time, grid):
        shift, scale, gate, *mlp = jnp.split(self.modulation(time)[:, None], 6, -1)
        x += gate * self.attention(self.norm(x) * (1 + scale) + shift, grid)
        shift, scale, gate = mlp
        hidden = self.up(self.norm(x) * (1 + scale) + shift)
        return x + gate * self.down(nnx.gelu(hidden))


class DiT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Linear(CHANNELS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.head = nnx.Linear(WIDTH, CHANNELS, rngs=rngs)

    def __call__(self, latent, time):
        x = self.embed(rearrange(latent, "B F H W C -> B (F H W) C"))
        for block in self.blocks:
            x = block(x, time, grid=latent.shape[1:4])
        return self.head(x).reshape(latent.shape)


if __name__ == "__main__":
    model = DiT(nnx.Rngs(0))
    noise = jax.random.normal(jax.random.key(0), (1, *GRID, CHANNELS))
    velocity = nnx.jit(model)(noise, jnp.ones((1, 1)))
    print(f"velocity {velocity.shape}, standard deviation {velocity.std():.3f}")
