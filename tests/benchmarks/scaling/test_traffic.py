"""What is read from programs: collectives, how often they run, and work meanwhile."""

from benchmarks.scaling.traffic import totals, traffic

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%kernel (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  ROOT %y = bf16[4,8]{1,0} add(%x, %x)
}

%own_sum (shares: f32[40]) -> f32[40] {
  %shares = f32[40]{0} parameter(0)
  ROOT %all-reduce.1 = f32[40]{0} all-reduce(%shares), to_apply=%kernel
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x.1 = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %all-to-all-start = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-to-all-start(%x.1), dimensions={0}
  %all-to-all-start.1 = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-to-all-start(%x.1), dimensions={0}
  %gemm_fusion_dot.3 = bf16[4,8]{1,0} fusion(%x.1), kind=kCustom, calls=%kernel
  %call.1 = (bf16[4,8]{1,0}, s8[64]{0}) custom-call(%x.1), custom_call_target="__cublas$gemm"
  %all-to-all-done = bf16[4,8]{1,0} all-to-all-done(%all-to-all-start)
  %call.2 = bf16[4,8]{1,0} custom-call(%all-to-all-done), custom_call_target="mosaic_gpu_v2"
  %all-to-all-done.1 = bf16[4,8]{1,0} all-to-all-done(%all-to-all-start.1)
  %all-reduce = f32[] all-reduce(%sum), to_apply=%kernel
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%i, %all-to-all-done.1)
}

%outer (state.1: (s32[])) -> (s32[]) {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%state.1), condition=%always, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (a: f32[2,8]) -> f32[4,8] {
  %a = f32[2,8]{1,0} parameter(0)
  %while.2 = (s32[]) while(%a), condition=%always, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %permute = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %fusion.7 = f32[2,8]{1,0} fusion(%a), kind=kLoop, calls=%kernel
  %permute-done = f32[2,8]{1,0} collective-permute-done(%permute)
  %sum = f32[40]{0} fusion(%a), kind=kCustom, calls=%own_sum
  ROOT %all-gather = f32[4,8]{1,0} all-gather(%permute-done), dimensions={0}
}
"""  # noqa: E501


def test_operations_are_counted_with_their_loops_and_what_runs_beside_them():
    """Five layers in each of two calls; the second exchange ends after a kernel."""
    records = traffic(PROGRAM)
    assert records == [
        {"kind": "all-reduce", "bytes": 160, "times": 1},
        {"kind": "all-to-all", "bytes": 64, "meanwhile": {"product": 2}, "times": 10},
        {
            "kind": "all-to-all",
            "bytes": 64,
            "meanwhile": {"product": 2, "kernel": 1},
            "times": 10,
        },
        {"kind": "all-reduce", "bytes": 4, "times": 10},
        {
            "kind": "collective-permute",
            "bytes": 64,
            "meanwhile": {"fusion": 1},
            "times": 1,
        },
        {"kind": "all-gather", "bytes": 128, "times": 1},
    ]


def test_totals_add_up_bytes_and_the_share_beside_products_and_kernels():
    records = [
        {"kind": "all-to-all", "bytes": 10, "times": 3, "meanwhile": {"product": 1}},
        {"kind": "all-to-all", "bytes": 10, "times": 1, "meanwhile": {"fusion": 4}},
        {"kind": "all-gather", "bytes": 7, "times": 2},
    ]
    assert totals(records) == {
        "all-to-all": {"times": 4, "bytes": 40, "overlapped": 0.75},
        "all-gather": {"times": 2, "bytes": 14, "overlapped": 0.0},
    }
