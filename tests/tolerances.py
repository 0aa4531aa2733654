"""Tolerances by dtype and stage; the error that was measured stands beside each.

Inputs are rounded to the dtype before both sides compute, and the reference is
float64 NumPy, so a tolerance covers the kernel's own arithmetic and the rounding of
its output. Values are for numpy.testing.assert_allclose.
"""

# Attention output for standard normal inputs.
ATTENTION = {
    "float32": {"rtol": 0, "atol": 4e-6},
    "bfloat16": {"rtol": 1e-2, "atol": 8e-3},
    "float16": {"rtol": 2e-3, "atol": 1e-3},
}

# Log-sum-exp, always float32.
LSE = {
    "float32": {"rtol": 1e-6, "atol": 3e-6},
    "bfloat16": {"rtol": 1e-6, "atol": 3e-6},
    "float16": {"rtol": 1e-6, "atol": 3e-6},
}

# Gradients in float32, for cotangents of size one.
GRADIENT = {"float32": {"rtol": 0, "atol": 2e-5}}

# Float32 logits of size 1e4 carry an absolute error of about 1e4 * 2^-23 * a few,
# which the exponential turns into a relative error of the weights.
HUGE_LOGITS = {"rtol": 0, "atol": 3e-2}

# On a GPU, for standard normal inputs: the float32 sum of exponentials of logits
# whose products were exact in float32.
GPU_LSE = {"rtol": 1e-5, "atol": 1e-5}

# Relative L2 error of gradients on a GPU; bfloat16 rounds probabilities and outputs.
# Both are bounds from the number of bits (2^-9 per rounding, a few roundings).
GPU_GRADIENT = {"float32": 1e-5, "bfloat16": 1e-2}

# On a GPU: narrow inputs through tensor cores, where probabilities are rounded to
# the input dtype before they multiply V. float32 at matmul precision "highest".
GPU_ATTENTION = {
    "float32": {"rtol": 0, "atol": 1e-5},
    "bfloat16": {"rtol": 2e-2, "atol": 2e-2},
    "float16": {"rtol": 4e-3, "atol": 4e-3},
}

# Relative L2 error of the Hopper kernel against float32, for standard normal inputs.
# Measured on an H200: bfloat16 2.2e-3, as cuDNN's; float16 2.9e-4.
GPU_RELATIVE = {"bfloat16": 4e-3, "float16": 5e-4}

# Wan's autoencoder against diffusers in float32, largest difference. Measured on CPU:
# pixels 3.0e-6, latents 1.5e-6.
VAE_PARITY = {"rtol": 0, "atol": 1e-5}

# Its pixels with bfloat16 convolutions, relative L2 error. Measured on CPU: 0.0073.
VAE_BFLOAT16 = 0.02

# Its tiled against whole frames, relative L2 error, for random weights, whose attention
# is strong. Measured on CPU: pixels 0.12, latents 0.021.
VAE_TILING = {"decode": 0.2, "encode": 0.05}

# On a GPU, not measured yet: at matmul precision "highest" the largest difference may
# be ten times the CPU's; TF32 rounds to 11 bits where bfloat16 rounds to 8.
GPU_VAE_PARITY = {"rtol": 0, "atol": 1e-4}
GPU_VAE_RELATIVE = {"float32": 5e-3, "bfloat16": 3e-2}
