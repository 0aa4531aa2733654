"""An H100 as the target of compilation, on a machine without a GPU.

pip install --no-deps --target cuda jax-cuda13-plugin==J jax-cuda13-pjrt==J \
        nvidia-cuda-nvcc     # J: the version of the installed jax
PYTHONPATH=cuda PATH=cuda/nvidia/cu13/bin:$PATH python -m ...
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src.lib import cuda_versions
from jax.experimental import topologies

from pallas_kernels.common.device import Device

H100 = Device(platform="gpu", kind="NVIDIA H100", compute_capability=(9, 0))
CUDNN_VERSION = 91900
# Without the version of CUDA's runtime, XLA has no products in FP8.
DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84941864960
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def leave_gpus_alone() -> None:
    """Makes JAX run on the CPU beside the plugin for GPUs. Call it before JAX runs."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")


def h100_sharding() -> jax.sharding.SingleDeviceSharding:
    """Returns the sharding of arrays of a program that is compiled for one H100."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=DESCRIPTION, topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@contextlib.contextmanager
def on_h100() -> Iterator[None]:
    """Makes the library choose what it chooses on an H100."""
    with contextlib.ExitStack() as stack:

        def set_result(module, name, value):
            patch = mock.patch.object(module, name, return_value=value)
            stack.enter_context(patch)

        for name, module in list(sys.modules.items()):
            is_own = name.split(".")[0] in ("draft_jax", "pallas_kernels", "models")
            if is_own and hasattr(module, "current_device"):
                set_result(module, "current_device", H100)
        set_result(cuda_versions, "cudnn_get_version", CUDNN_VERSION)
        yield
