# The text of compilers stands as they write it.
# ruff: noqa: E501
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lljax.parallel.rounding import cdiv
from lljax.parallel.sharding import make_mesh
from lljax.planning.hlo import KINDS, bits, collective_bytes, cudnn_workspace


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

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("fsdp"),
        check_vma=False,
    )
    def f(x):
        return jax.lax.psum_scatter(x, "fsdp", tiled=True)

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    assert collective_bytes(jax.jit(f).lower(x).compile().as_text()) == {
        "reduce-scatter": 64 * 32 * 4
    }


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
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        + line.format(shape=gather, kind="all-gather")
        + line.format(shape=reduced, kind="all-reduce")
        + "}"
    )
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
    call = (
        "  %{name}.1 = (bf16[{q}]{{3,1,2,0}}, bf16[{k}]{{3,1,2,0}}, bf16[{k}]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q), "
        'custom_call_target="__cudnn$fmhaSoftmax{backward}"\n'
    )
    grouped = call.format(name="a", q="1,32,4096,128", k="1,8,4096,128", backward="Backward")
    alike = call.format(name="b", q="17,8,1024,64", k="17,8,1024,64", backward="Backward")
    forward = call.format(name="c", q="9,32,4096,128", k="9,8,4096,128", backward="")
    assert cudnn_workspace(forward) == 0
    assert cudnn_workspace(forward + alike) == 4 * 17 * 8 * 1024 * 65
    assert cudnn_workspace(grouped + alike) == 4 * 32 * 4096 * 129 + 2 * 2 * 32 * 4096 * 128


@pytest.mark.parametrize(
    "dtype,size",
    [
        ("pred", 8),
        ("s2", 2),
        ("u2", 2),
        ("s4", 4),
        ("u4", 4),
        ("s8", 8),
        ("u16", 16),
        ("s32", 32),
        ("u64", 64),
        ("f16", 16),
        ("bf16", 16),
        ("f32", 32),
        ("f64", 64),
        ("f4e2m1fn", 4),
        ("f8e3m4", 8),
        ("f8e4m3", 8),
        ("f8e4m3fn", 8),
        ("f8e4m3fnuz", 8),
        ("f8e4m3b11fnuz", 8),
        ("f8e5m2", 8),
        ("f8e5m2fnuz", 8),
        ("f8e8m0fnu", 8),
        ("c64", 64),
        ("c128", 128),
        ("token", 0),
        ("opaque", 0),
    ],
)
def test_every_type_of_hlo_has_its_size(dtype, size):
    assert bits(dtype) == size
    text = f"ENTRY %main (p: f32[]) -> f32[] {{\n  %x.1 = {dtype}[3,5]{{1,0}} all-gather(%p), dimensions={{0}}\n}}"
    assert collective_bytes(text).get("all-gather", 0) == cdiv(15 * size, 8)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="unknown HLO type 'quad128x'"):
        collective_bytes(
            "ENTRY %main (p: f32[]) -> f32[] {\n  %x = quad128x[3]{0} all-gather(%p), dimensions={0}\n}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_collective_counts_once_however_it_is_written(kind):
    factor = 2 if kind == "all-reduce" else 1
    given, gotten = ("8,4", "2,4") if kind == "reduce-scatter" else ("2,4", "8,4")
    size = 8 * 4
    plain = f"  %p.1 = s8[{given}]{{1,0}} parameter(0)\n  %x.1 = s8[{gotten}]{{1,0}} {kind}(%p.1), channel_id=1\n"
    if kind == "ragged-all-to-all":
        plain = plain.replace("(%p.1),", "(%p.1, %out, %a, %b, %c, %d),")
    assert collective_bytes("ENTRY %main (p: s8[2]) -> s8[8] {\n" + plain + "}") == {
        kind: factor * size
    }
    operands = (
        f"(s8[{given}]{{1,0}}, s8[8,4]{{1,0}}, s32[8]{{0}}, s32[8]{{0}}, s32[8]{{0}}, s32[8]{{0}})"
        if kind == "ragged-all-to-all"
        else f"s8[{given}]{{1,0}}"
    )
    shape = (
        f"s8[{gotten}]{{1,0}}"
        if kind == "all-reduce"
        else f"({operands}, s8[{gotten}]{{1,0}}, u32[], u32[])"
    )
    started = f"  %x-start = {shape} {kind}-start(%p.1), channel_id=1\n  %x-done = s8[{gotten}] {kind}-done(%x-start)\n"
    assert collective_bytes("ENTRY %main (p: s8[2]) -> s8[8] {\n" + started + "}") == {
        kind: factor * size
    }
    wrapped = f"""
%wrapped (p.1: s8[{given}]) -> s8[{gotten}] {{
{plain}}}

ENTRY %main (p.1: s8[{given}]) -> s8[{gotten}] {{
  %start = ((s8[{given}]{{1,0}}), s8[{gotten}]{{1,0}}, u32[]) async-start(%p.1), calls=%wrapped
  ROOT %done = s8[{gotten}]{{1,0}} async-done(%start), calls=%wrapped
}}
"""
    assert collective_bytes(wrapped) == {kind: factor * size}


def test_a_dimension_that_may_be_shorter_counts_whole():
    text = "ENTRY %main (p: f32[]) -> f32[] {\n  %x.1 = bf16[<=8,4]{1,0} all-to-all(%p), dimensions={0}\n}"
    assert collective_bytes(text) == {"all-to-all": 64}
