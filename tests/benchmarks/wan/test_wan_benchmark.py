"""The parts of the Wan benchmark that no GPU is needed for."""

import jax
import numpy as np
from flax import nnx

from benchmarks.wan import account as wan_account
from benchmarks.wan import weights as wan_weights
from models.checkpoints.safetensors_io import load_safetensors
from models.wan.checkpoint import open_wan_parts
from models.wan.config import WanConfig

CONFIG = WanConfig(
    dim=12,
    ffn_dim=20,
    num_heads=2,
    num_layers=3,
    text_dim=8,
    text_length=5,
    freq_dim=4,
    in_channels=3,
    out_channels=2,
)


def test_written_weights_load(tmp_path):
    sizes = wan_weights.write_folder(CONFIG, tmp_path, max_shard_bytes=4000)
    files = sorted(tmp_path.glob("transformer/*.safetensors"))
    assert len(files) == len(sizes) > 1
    parts = open_wan_parts(
        tmp_path, parts=("transformer",), text_length=CONFIG.text_length
    )
    blocks = parts.load_transformer().blocks
    np.testing.assert_array_equal(blocks.norm2.scale[...], np.ones((3, 12)))
    np.testing.assert_array_equal(blocks.attn1.norm_q.scale[...], np.ones((3, 12)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(blocks)))
    kernel = np.asarray(blocks.ffn.linear_1.kernel[...], np.float32)
    # 720 numbers of standard deviation 0.02: four standard errors.
    np.testing.assert_allclose(kernel.std(), 0.02, atol=4 * 0.02 / np.sqrt(2 * 720))


def test_tensors_longer_than_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(wan_weights, "BLOCK_NUMBERS", 7)
    wan_weights.write_folder(CONFIG, tmp_path)
    weights = load_safetensors(tmp_path / "transformer")
    values = np.asarray(weights["blocks.0.ffn.net.0.proj.weight"], np.float32).ravel()
    assert values.shape == (240,)
    assert len(np.unique(values)) == 7
    np.testing.assert_array_equal(values[14:], values[7:-7])


def test_arithmetic_of_a_case_by_hand():
    """10 tokens of width 12, 5 rows of text, 3 layers."""
    parts = wan_account.flops_outside_attention(CONFIG, 10)
    assert parts == {
        "self-attention's projections": 3 * 4 * 2 * 10 * 12 * 12,
        "cross-attention's projections": 3 * 2 * (2 * 10 + 2 * 5) * 12 * 12,
        "cross-attention": 3 * 2 * 2 * 10 * 5 * 12,
        "feed-forward": 3 * 2 * 2 * 10 * 12 * 20,
        "patches, head and text": 2 * 10 * 4 * (3 + 2) * 12
        + 2 * 5 * (8 * 12 + 12 * 12),
    }
