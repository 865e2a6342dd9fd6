import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lljax.planning.hlo import collective_bytes, cudnn_workspace
from lljax.sharding import make_mesh


def test_a_gather_inside_a_loop_counts_as_often_as_it_runs():
    mesh = make_mesh(fsdp=8)

    def where(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def f(x, weights):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, where())), None
        return jax.lax.scan(body, x, weights)[0].sum()
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=where("fsdp"))
    weights = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32, sharding=where(None, "fsdp"))
    seen = collective_bytes(jax.jit(f, out_shardings=where()).lower(x, weights).compile().as_text())
    assert seen["all-gather"] == 7 * 32 * 32 * 4
    assert seen["all-reduce"] == 2 * 4


def test_a_tpu_collective_that_goes_on_beside_other_work_counts_once():
    text = """
%fused_computation.1 (p: bf16[1,8,64]) -> (bf16[1,8,64], bf16[1,64,64]) {
  %all-gather.1 = bf16[1,64,64]{2,1,0} all-gather(%p), channel_id=3, dimensions={1}
}

%async_collective_fusion.2 (p: bf16[1,8,64]) -> (bf16[1,8,64], bf16[1,64,64]) {
  %all-gather.2 = bf16[1,64,64]{2,1,0} all-gather(%p), channel_id=3, dimensions={1}
}

%fused_computation.3 (p: bf16[1,8,64]) -> bf16[1,64,64] {
  %all-gather.3 = bf16[1,64,64]{2,1,0} all-gather(%p), channel_id=3, dimensions={1}
}

ENTRY %main (p: bf16[1,8,64]) -> bf16[1,64,64] {
  %async-collective-start.7 = (bf16[1,8,64], bf16[1,64,64]) fusion(%p), kind=kCustom, calls=%fused_computation.1
  %fusion.8 = (bf16[4,4], bf16[1,8,64]) fusion(%async-collective-start.7), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %async-collective-done.9 = bf16[1,64,64] fusion(%fusion.8), kind=kCustom, calls=%fused_computation.3
}
"""
    assert collective_bytes(text) == {"all-gather": 64 * 64 * 2}


def test_a_reduce_scatter_counts_what_is_reduced():
    mesh = make_mesh(fsdp=8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("fsdp"), check_vma=False)
    def f(x):
        return jax.lax.psum_scatter(x, "fsdp", tiled=True)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    assert collective_bytes(jax.jit(f).lower(x).compile().as_text()) == {"reduce-scatter": 64 * 32 * 4}


def test_a_tpu_reduce_scatter_may_be_a_fused_all_reduce():
    text = """
%all-reduce-scatter.1.clone (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.4 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, to_apply=%add
  ROOT %dynamic-slice.2 = bf16[8,32]{1,0} dynamic-slice(%all-reduce.4, %at), dynamic_slice_sizes={8,32}
}

ENTRY %main (p: bf16[64,32]) -> bf16[8,32] {
  ROOT %fusion.8 = bf16[8,32]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""
    assert collective_bytes(text) == {"reduce-scatter": 64 * 32 * 2}


def test_a_started_collective_of_several_arrays_counts_all_of_them():
    line = "  %start.1 = {shape} {kind}-start(%a, %b), channel_id=1\n"
    gather = "((bf16[1,8]{1,0}, f32[1,4]{1,0}), (bf16[8,8]{1,0}, f32[8,4]{1,0}))"
    reduced = "(f32[8]{0}, /*index=1*/f32[4]{0})"
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n" + line.format(shape=gather, kind="all-gather") + \
        line.format(shape=reduced, kind="all-reduce") + "}"
    assert collective_bytes(text) == {"all-gather": 64 * 2 + 32 * 4, "all-reduce": 2 * 12 * 4}


def test_the_loop_of_a_tpu_program_is_read_from_its_condition():
    text = """
%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %all-gather.7 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=1, dimensions={1}
}

%condition (p: (s32[], bf16[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(7)
  ROOT %lt.3 = pred[]{:T(512)} compare(%get-tuple-element.27, %constant.5), direction=LT
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %while.9 = (s32[]{:T(128)}, bf16[8]{0}) while(%tuple.17), condition=%condition, body=%body
}
"""
    assert collective_bytes(text) == {"all-gather": 7 * 512 * 512 * 2}


def test_the_workspace_of_cudnn_is_that_of_its_largest_backward_pass():
    call = ('  %{name}.1 = (bf16[{q}]{{3,1,2,0}}, bf16[{k}]{{3,1,2,0}}, bf16[{k}]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q), '
            'custom_call_target="__cudnn$fmhaSoftmax{backward}"\n')
    grouped = call.format(name="a", q="1,32,4096,128", k="1,8,4096,128", backward="Backward")
    alike = call.format(name="b", q="17,8,1024,64", k="17,8,1024,64", backward="Backward")
    forward = call.format(name="c", q="9,32,4096,128", k="9,8,4096,128", backward="")
    assert cudnn_workspace(forward) == 0
    assert cudnn_workspace(forward + alike) == 4 * 17 * 8 * 1024 * 65
    assert cudnn_workspace(grouped + alike) == 4 * 32 * 4096 * 129 + 2 * 2 * 32 * 4096 * 128
