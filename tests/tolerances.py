"""Tolerances by dtype and stage; the error that was measured stands beside each.

Inputs are rounded to the dtype before both sides compute, and the reference is
float64 NumPy, so a tolerance covers the kernel's own arithmetic and the rounding of
its output. Values are for numpy.testing.assert_allclose.

Bounds of relative L2 errors of narrow dtypes are 1.2 times what was measured on both
supported versions of jax, which agree to three digits: twice would hide one more
rounding.
"""

# How properties of a test begin that its fixture `measured` recorded.
MEASURED = "measured: "

# Attention output for standard normal inputs.
ATTENTION = {
    "float32": {"rtol": 0, "atol": 4e-6},
    "bfloat16": {"rtol": 1e-2, "atol": 8e-3},
    "float16": {"rtol": 2e-3, "atol": 1e-3},
}

# Output with a correction that is fitted in float32 to standard normal queries, and
# the map's matrix over its greatest number. Measured on CPU: 6.3e-7 and 2.4e-6.
CORRECTION = {"rtol": 0, "atol": 1e-5}

# Log-sum-exp, always float32.
LSE = {
    "float32": {"rtol": 1e-6, "atol": 3e-6},
    "bfloat16": {"rtol": 1e-6, "atol": 3e-6},
    "float16": {"rtol": 1e-6, "atol": 3e-6},
}

# Gradients in float32, for cotangents of size one.
GRADIENT = {"float32": {"rtol": 0, "atol": 2e-5}}

# Tangents, second and third derivatives in float32, of size one to a hundred. Measured
# on CPU: 2.3e-5 at a value of 42.
SECOND_DERIVATIVE = {"rtol": 2e-6, "atol": 2e-5}

# Relative L2 error of the Hopper kernel's gradients against float32 matrices. Measured
# in interpret mode: bfloat16 2.5e-3, float16 3.13e-4, which is the rounding of results.
GRADIENT_RELATIVE = {"bfloat16": 3e-3, "float16": 3.8e-4}

# Float32 logits of size 1e4 carry an absolute error of about 1e4 * 2^-23 * a few,
# which the exponential turns into a relative error of the weights.
HUGE_LOGITS = {"rtol": 0, "atol": 3e-2}

# Log-sum-exp of logits of size 300 to 1e4: a few roundings of float32.
HUGE_LSE = {"rtol": 1e-6, "atol": 0}

# On a GPU, for standard normal inputs: the float32 sum of exponentials of logits
# whose products were exact in float32. Measured on an H100: 1.9e-6.
GPU_LSE = {"rtol": 1e-5, "atol": 1e-5}

# Relative L2 error of gradients on a GPU; bfloat16 rounds probabilities and outputs.
# Both are bounds from the number of bits (2^-9 per rounding, a few roundings).
GPU_GRADIENT = {"float32": 1e-5, "bfloat16": 1e-2}

# Relative L2 difference of bfloat16 gradients that are summed in another order: 121 of
# 1,048,576 differed, in their last bits.
GPU_GRADIENT_ORDER = 1e-3

# On a GPU: narrow inputs through tensor cores, where probabilities are rounded to
# the input dtype before they multiply V. float32 at matmul precision "highest".
# Measured on an H100: bfloat16 4.8e-3; the others were not recorded, but each run of
# the GPU tests ends with what it found ("measured: GPU_ATTENTION ...").
GPU_ATTENTION = {
    "float32": {"rtol": 0, "atol": 1e-5},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
    "float16": {"rtol": 4e-3, "atol": 4e-3},
}

# Relative L2 error of the Hopper kernel against float32, for standard normal inputs.
# Measured on an H100: bfloat16 2.4e-3, float16 2.9e-4, 1.04 times cuDNN's at most.
GPU_RELATIVE = {"bfloat16": 4e-3, "float16": 5e-4}

# UMT5 encoder in float32 against transformers, outputs of order one (up to 5.7).
# Measured on CPU: 2.0e-6 (narrow_inner).
UMT5_PARITY = {"rtol": 0, "atol": 1e-5}

# Relative L2 error of the bfloat16 UMT5 encoder against transformers in float32.
# Measured on CPU: 6.21e-3 and 1.004e-2; transformers' own bfloat16: 8.8e-3 and 1.07e-2.
UMT5_BFLOAT16_RELATIVE = {"far": 7.4e-3, "wide_inner": 1.2e-2}

# Relative L2 error of a bfloat16 Wan transformer against diffusers' in float32.
# Measured on CPU: 4.44e-3 (divided) and 5.27e-3 (image).
WAN_BFLOAT16_RELATIVE = {"divided": 5.3e-3, "image": 6.3e-3}
# Samples of size 2.5 anywhere in a sampling loop of up to 50 steps, against the
# published scheduler in float32. Measured on CPU: 1.7e-6 (Euler), 2.1e-6 (UniPC; the
# published float32 loop itself is 1.4e-6 from its float64 one).
SCHEDULER_LOOP = {"rtol": 0, "atol": 1e-5}
# The same in float64, from the same sigmas. Measured: 8.2e-15.
SCHEDULER_LOOP_FLOAT64 = {"rtol": 0, "atol": 1e-13}

# Mask and latent of an image, with a linear stand-in for the VAE, up to 1.8; measured:
# 1.2e-7.
IMAGE_CONDITION = {"rtol": 0, "atol": 1e-6}
# Latents up to 8.2 after a whole run of a tiny transformer, computed in two ways;
# measured on CPU: 4.8e-6.
TINY_RUN = {"rtol": 0, "atol": 2e-5}
# Latents up to 6.3 after 10 guided steps, against diffusers' pipelines. Measured on
# CPU: 1.4e-5 (text, UniPC), 5.5e-6 (image, Euler).
PUBLISHED_RUN = {"rtol": 0, "atol": 5e-5}
# Latents and pixels of a whole run against diffusers' HunyuanVideo pipeline, greatest
# difference over the greatest value; and of HunyuanCustom. Measured on CPU: 1.2e-5.
HUNYUAN_RUN = 5e-5
# Velocities of HunyuanCustom against the rules of its own code, likewise. Measured on
# CPU: 1.5e-6.
HUNYUAN_CUSTOM = 1e-5
# Wan2.2 against diffusers, greatest difference over the greatest value: velocities with
# one or two times, its autoencoder, and latents of whole runs. Measured on CPU: 3.9e-7,
# 1.4e-6 and 5.5e-7.
WAN2_2_PART = 1e-5
WAN2_2_RUN = 5e-5

# Wan's autoencoder against diffusers in float32, largest difference. Measured on CPU:
# pixels 3.0e-6, latents 1.5e-6; Wan2.2's: 1.6e-6, 5.7e-7; HunyuanVideo's, whole and
# tiled: pixels 4.6e-6, latents 2.1e-6, log variances 3.4e-6.
VAE_PARITY = {"rtol": 0, "atol": 1e-5}

# Its pixels with bfloat16 convolutions, relative L2 error. Measured on CPU: 7.29e-3.
VAE_BFLOAT16 = 8.7e-3

# HunyuanVideo's, relative L2 error. Measured on CPU: 1.38e-2 and 1.57e-2.
HUNYUAN_VAE_BFLOAT16 = {"video": 1.7e-2, "latents": 1.9e-2}

# Its tiled against whole frames, relative L2 error, for random weights, whose attention
# is strong. Measured on CPU: pixels 0.12, latents 0.021.
VAE_TILING = {"decode": 0.2, "encode": 0.05}

# On a GPU: at matmul precision "highest" the largest difference may be ten times the
# CPU's; TF32 rounds to 11 bits where bfloat16 rounds to 8. Met on an H100; the
# differences themselves were not recorded.
GPU_VAE_PARITY = {"rtol": 0, "atol": 1e-4}
GPU_VAE_RELATIVE = {"float32": 5e-3, "bfloat16": 3e-2}

# CLIP vision tower in float32 against transformers, outputs up to 7.2. Measured on
# CPU: 1.9e-6; from an image, with the resize: 6.1e-6.
CLIP_PARITY = {"rtol": 0, "atol": 1e-5}
# Relative L2 error of the tower with narrow products against transformers in float32.
# Measured on CPU: bfloat16 6.80e-3, float16 7.22e-4.
CLIP_NARROW_RELATIVE = {"bfloat16": 8.1e-3, "float16": 8.6e-4}
# Bicubic resize of noise in [-1, 1] against torch, and the pixels normalised from it.
# Measured on CPU: 1.7e-6 (61x45), 5.1e-7 (720x1280).
BICUBIC = {"rtol": 0, "atol": 5e-6}

# Norm and rotation in float32 of values up to 14, rounded to the dtype once, against
# float64 loops. rtol is a unit in the last place, where half a unit would do but for
# ties. Measured on CPU: float32 1.2e-6; beyond rtol, bfloat16 3.1e-8, float16 7.4e-8.
NORM_ROPE = {
    "float32": {"rtol": 1e-6, "atol": 3e-6},
    "bfloat16": {"rtol": 2**-8, "atol": 3e-6},
    "float16": {"rtol": 2**-11, "atol": 3e-6},
}
# Means of a tile in float32 against float64 of the same values. Measured on CPU:
# 1.8e-7. The kernel adds tokens one after another: 128 roundings.
POOLED = {"rtol": 1e-5, "atol": 2e-6}

# Velocities of a tiny Wan transformer in float32, of order one, whose norm, rotation
# and pooling are one kernel in interpret mode, against XLA's. Measured on CPU: 7.7e-7.
FUSED_MODEL = {"rtol": 0, "atol": 1e-5}

# Bfloat16 velocities of a transformer with this project's kernels against float32:
# relative L2 error over that of the same model on XLA in bfloat16.
GPU_MODEL_ERROR_RATIO = 1.2

# Share of the kept pairs that two programs of one bfloat16 model agree on: XLA may fuse
# and round what leads to the draft otherwise. Two random halves share half.
GPU_WAN_SHARED_PAIRS = 0.95

# A HunyuanVideo transformer in float32 against diffusers, over the largest output.
# Measured on CPU: 9.2e-7.
HUNYUAN_PARITY = {"rtol": 0, "atol": 5e-6}
# Relative L2 error of the transformer in bfloat16 against diffusers in float32.
# Measured on CPU: wide 7.64e-3, divided 7.54e-3, ragged 6.83e-3.
HUNYUAN_BFLOAT16_RELATIVE = {"wide": 9.2e-3, "divided": 9.1e-3, "ragged": 8.2e-3}

# Relative L2 error of a product in FP8 against float64 products of the same numbers:
# sums in float32. In bfloat16 products are rounded, and then results.
# Measured on CPU: 1.4e-7 and 2.2e-3.
FLOAT8_PRODUCT = {"float32": 3e-7, "bfloat16": 2.7e-3}

# Scores of tiles in float32, of size 0.02 to 1, against float64 loops.
TILE_SCORES = {"rtol": 1e-5, "atol": 1e-8}
# The same from bfloat16 queries and keys, for logits of standard deviation 1.
TILE_SCORES_BFLOAT16 = {"rtol": 2e-2, "atol": 1e-8}
# Scores of a draft on a GPU against those of the CPU. Products are float32.
GPU_DRAFT = {"rtol": 1e-4, "atol": 1e-7}
# The same with the spread's product in TF32: factors cut by up to 2^-10, and a root.
GPU_SPREAD = {"rtol": 1.2e-3, "atol": 1e-7}
# The same of sub-tiles by the kernel: for logits below 1, whose errors in bfloat16 are
# below 1e-3 (4.9e-4 measured, H200), and sums of which each is rounded by up to 2^-9.
GPU_DRAFT_OF_SUB_TILES = {"rtol": 4e-3, "atol": 1e-7}
# TILE_SCORES where products are exact: sums over the parts of a tile are rounded to
# bfloat16, and once more where references change.
TILE_SCORES_OF_EXACT_LOGITS = {"rtol": 8e-3, "atol": 1e-8}
