"""Products of weights in registers with a block of V in shared memory (wgmma, sm_90).

Pallas' own `wgmma` wants a multiple of 64 keys; edge tiles have 80 or 96. A product
here takes any multiple of 16, from the first rows of the block.

    acc = issue(acc, weights, v_block)   # runs while other code does
    plgpu.wgmma_wait(0)
    acc = settle(acc)                    # from here on it may be used
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_kernels.common.lanes import WGMMA, smem_transforms

SWIZZLE = 128  # bytes
STEP = 16  # keys of one instruction


def issue(acc, weights, v_block):
    """Starts acc + weights @ v_block[:keys], and commits it as one group.

    Args:
      acc: float32 [rows, D] in the WGMMA layout.
      weights: bfloat16 or float16 [rows, keys] in the WGMMA layout; keys a multiple of
        STEP, at most the block's.
      v_block: The block, [block, D], swizzled as `smem_transforms` says.

    Returns:
      The sum. It must not be used before `wgmma_wait` and `settle`.
    """
    result = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=WGMMA)
    block_type = plgpu.RefType(smem_transforms())

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA, block_type), return_type=result)
    def start(_, acc, weights, v_block):
        # In the layout of single registers, fenced.
        running = mgpu.WGMMAAccumulator.from_registers(acc)
        weights = wgmma_fence(weights)
        (base, strides), (_, group_stride), fastest = mma_utils.create_descriptor(
            v_block,
            swizzle=SWIZZLE,
            large_tile=(64, 64),
            group_size=(64, acc.shape[1]),
            logical_k_major=True,
        )
        registers = running._value.registers
        keys = weights.shape[1]
        for first in range(0, keys, STEP):
            group, step = divmod(first, 64)
            offset = group * group_stride + step // STEP * strides[1][0]
            registers = wgmma_m64(
                registers,
                weights[:, first : first + STEP],
                _advance(base, offset),
                a_transpose=None,
                b_transpose=fastest != mma_utils.Dim.K,
                a_k_stride=None,
                b_k_stride=strides[1][0],
                n=acc.shape[1],
                swizzle=2 * STEP,  # bytes of keys: one instruction at a time
                a_element_type=weights.mlir_dtype,
                b_element_type=weights.mlir_dtype,
            )
        nvvm.wgmma_commit_group_sync_aligned()
        product = mgpu.FragmentedArray(
            _registers=registers, _layout=running._value.layout, _is_signed=None
        )
        return product.to_layout(acc.layout)

    return start(acc, weights, v_block)


def settle(acc):
    """Keeps uses of a sum behind the wait for it."""
    result = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=result)
    def barrier(_, acc):
        return mgpu.fragmented_array.optimization_barrier(acc)

    return barrier(acc)


def _advance(descriptor, offset: int):
    """Returns a descriptor of the matrix that begins `offset` bytes later."""
    if not offset:
        return descriptor
    i64 = ir.IntegerType.get_signless(64)
    return llvm.add(
        descriptor,
        mgpu.c(mma_utils.encode_addr(offset), i64),
        overflow_flags=llvm.IntegerOverflowFlags.none,
    )
