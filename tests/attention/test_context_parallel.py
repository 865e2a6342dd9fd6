"""Every context-parallel mode against one device, values and gradients, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_attention import assert_equal, positions

from lljax.attention import Mask, attend, attend_shifted, causal
from lljax.attention.context_parallel import _in_order, attend_parallel, choose, halo_size
from lljax.attention.mask import chunked
from lljax.errors import ConfigError
from lljax.parallel.sharding import ROWS, TOKENS, Layout, make_mesh, zigzag

B, T, H = 2, 512, 8
HEADS = [(8, 8), (8, 2), (6, 2)]
MESHES = {
    "8": {"sequence": 8},
    "2 x 4": {"fsdp": 2, "sequence": 4},
    "4 x 2 heads": {"sequence": 4, "tensor": 2},
}
PATTERNS = {
    "full": (None, None, False),
    "window": (None, 50, False),
    "window and anchors": (None, 50, True),
    "shifted": (64, None, False),
    "shifted, wide": (96, None, False),
    "chunks": (None, 50, False),
}
CAPPED = ("window", "shifted, wide")  # these with soft-capped scores, too
SUNK = ("full", "window and anchors", "shifted")  # and these with sinks


def inputs(N, K, packed, window, anchored, chunks=False):
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N)
    )
    segments = np.sort(rng.integers(1, 4, size=(B, T)), axis=1)
    segments[1, -T // 5 :] = 0
    mask = causal(B, T, jnp.asarray(segments, jnp.int32) if packed else None).replace(window=window)
    if anchored:
        mask = mask.replace(anchors=jnp.asarray(rng.random((B, T)) < 0.05).at[:, :4].set(True))
    if chunks:
        places = positions(segments)
        mask = chunked(mask.replace(window=None), places, places, window)
    return q, k, v, weights, mask


def reorder(tree, parts, axis=1):
    return jax.tree.map(
        lambda x: jnp.asarray(
            np.moveaxis(zigzag(np.moveaxis(np.asarray(x), axis, -1), parts), -1, axis)
        ),
        tree,
    )


def run(q, k, v, weights, mask, group, layout, softcap=None, sinks=None):
    def loss(q, k, v, sinks):
        out = attend_parallel(
            q, k, v, mask, scale=0.3, softcap=softcap, sinks=sinks, group=group, layout=layout
        )
        return jnp.sum(out * weights), out

    where = NamedSharding(layout.mesh, PartitionSpec(ROWS, TOKENS))
    q, k, v, weights, mask = jax.device_put((q, k, v, weights, mask), where)
    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
    return (out, *grads[:3]), grads[3]


def one_device(q, k, v, weights, mask, group, softcap=None, sinks=None):
    def loss(q, k, v, sinks):
        if group is None:
            out = attend(q, k, v, mask, scale=0.3, softcap=softcap, sinks=sinks)
        else:
            out = attend_shifted(
                q, k, v, mask, group=group, scale=0.3, softcap=softcap, sinks=sinks
            )
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
    return (out, *grads[:3]), grads[3]


def cases():
    """All of them are slow together; each pattern, mesh and pair of head counts is in one that is
    not.
    """
    for N, K in HEADS:
        for pattern in PATTERNS:
            for mesh in MESHES:
                quick = (N, K, mesh) == (8, 2, "8") and pattern != "chunks"
                yield pytest.param(N, K, pattern, mesh, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("N,K,pattern,mesh", list(cases()))
def test_every_mode_equals_one_device(N, K, pattern, mesh):
    group, window, anchored = PATTERNS[pattern]
    packed = pattern != "window"
    arrays = inputs(N, K, packed, window, anchored, chunks=pattern == "chunks")
    softcap = 1.5 if pattern in CAPPED else None
    sinks = (
        jnp.asarray(np.random.default_rng(1).normal(size=N), jnp.float32)
        if pattern in SUNK
        else None
    )
    wanted, of_sinks = one_device(*arrays, group, softcap, sinks)
    mesh = make_mesh(**MESHES[mesh])
    size, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    for mode in ("allgather", "ulysses", "ring", "halo"):
        try:
            chosen, balanced, _ = choose(
                mode, T=T, size=size, tensor=tensor, N=N, K=K, H=H, group=group, windows=(window,)
            )
        except ConfigError as refusal:
            assert mode in ("halo", "ulysses") and "use 'auto'" in str(refusal)
            continue
        assert chosen == mode
        here = reorder(arrays, size) if balanced else arrays
        got = run(*here, group, Layout(mesh, mode, balanced), softcap, sinks)
        assert_equal(got, (reorder(wanted, size) if balanced else wanted, of_sinks))


def temporaries(mode, size):
    """Bytes of a device for a step of 256 tokens a device."""
    mesh = make_mesh(sequence=size, devices=jax.devices()[:size])
    layout = Layout(mesh, mode)

    def of(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(
            (1, 256 * size, *shape),
            dtype,
            sharding=NamedSharding(mesh, PartitionSpec(ROWS, TOKENS)),
        )

    def loss(q, k, v, index):
        return jnp.sum(
            attend_parallel(q, k, v, Mask(index, index, None, None, None), scale=0.1, layout=layout)
            ** 2
        )

    arrays = of((8, 64)), of((4, 64)), of((4, 64)), of((), jnp.int32)
    return (
        jax.jit(jax.grad(loss, (0, 1, 2)))
        .lower(*arrays)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def test_a_ring_holds_no_more_of_a_longer_row_on_more_devices():
    keys = 2 * 4 * 256 * 4 * 64 * 4  # bytes of keys and values of the four devices that are more
    assert temporaries("ring", 8) <= 1.01 * temporaries("ring", 4)
    assert temporaries("allgather", 8) >= temporaries("allgather", 4) + keys


def test_more_anchors_than_there_is_room_for():
    q, k, v, weights, mask = inputs(8, 2, True, 50, True)
    mask = mask.replace(anchors=jnp.ones((B, T), bool).at[:, 400:].set(False))
    # 256 tokens a device, room for 160 anchors
    many = Layout(make_mesh(fsdp=4, sequence=2), "halo")
    pad = [jnp.concatenate([x, x]) for x in (q, k, v, weights)]
    mask = jax.tree.map(lambda x: jnp.concatenate([x, x]), mask)
    assert_equal(run(*pad, mask, None, many), one_device(*pad, mask, None))


def test_the_choice_and_its_refusals():
    shape = dict(T=1_048_576, size=8, tensor=1, N=32, K=8, H=128)
    assert choose("auto", **shape, group=8192, windows=(None,))[0] == "halo"
    assert choose("auto", **shape, group=None, windows=(4096,))[0] == "halo"
    assert choose("auto", **shape, group=None, windows=(None,))[0] == "ulysses"
    few = shape | {"N": 9, "K": 3}  # dealt to no two devices
    assert choose("auto", **few, group=None, windows=(None,))[:2] == ("allgather", True)
    assert choose("auto", **few, group=None, windows=(None,), room=1e9)[:2] == ("ring", True)
    assert choose("auto", **shape, group=2**19, windows=(None,))[0] != "halo"
    with pytest.raises(ConfigError, match="looks 896 tokens back and a device holds 128"):
        choose("halo", **shape | {"T": 1024, "N": 7}, group=None, windows=(8192,))
    with pytest.raises(ConfigError, match="use a multiple, such as 1008"):
        choose("auto", **shape | {"T": 1001}, group=None, windows=(None,))


def test_a_halo_reaches_exactly_to_the_start_of_the_group():
    assert halo_size(64, 8, window=None, group=64) == 0
    assert halo_size(64, 8, window=None, group=64, shift=32) == 32
    assert halo_size(64, 8, window=10, group=64, shift=32) == 9
    assert halo_size(48, 8, window=None, group=64) == max((i * 48) % 64 for i in range(1, 8))


def test_gathered_keys_come_back_into_the_order_of_the_row():
    row = np.arange(48)[None]
    np.testing.assert_array_equal(_in_order(jnp.asarray(zigzag(row, 4)), 4), row)
