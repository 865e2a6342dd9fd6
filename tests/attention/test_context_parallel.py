"""Every context-parallel mode against one device, values and gradients, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention.cases import assert_equal, positions, sinks_of
from jax.sharding import NamedSharding, PartitionSpec

from lljax.attention import AttentionOptions, Mask, attend, attend_shifted, causal
from lljax.attention.attend import UnsupportedAttention
from lljax.attention.context_parallel import MODES, attend_parallel, choose
from lljax.attention.gathered import _in_order
from lljax.attention.halo import halo_size
from lljax.attention.mask import chunked
from lljax.attention.pattern import Groups
from lljax.attention.ring import _Ring
from lljax.errors import ConfigError
from lljax.parallel.sharding import ROWS, TOKENS, Layout, make_mesh, zigzag

B, T, H = 2, 512, 8
HEADS = [(8, 8), (8, 2), (6, 2)]
MESHES = {
    "8": {"sequence": 8},
    "2 x 4": {"fsdp": 2, "sequence": 4},
    "4 x 2 heads": {"sequence": 4, "tensor": 2},
}
PATTERNS = {  # groups, window, anchors
    "full": (None, None, False),
    "window": (None, 50, False),
    "window and anchors": (None, 50, True),
    "shifted": (Groups(64, 32), None, False),
    "shifted, wide": (Groups(96, 48), None, False),
    "unshifted": (Groups(64, 0), None, False),
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


def run(arrays, groups, layout, options):
    q, k, v, weights, mask = arrays

    def loss(q, k, v, sinks):
        out = attend_parallel(
            q, k, v, mask, options.replace(sinks=sinks), groups=groups, layout=layout
        )
        return jnp.sum(out * weights), out

    where = NamedSharding(layout.mesh, PartitionSpec(ROWS, TOKENS))
    q, k, v, weights, mask = jax.device_put((q, k, v, weights, mask), where)
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), grads = gradients(q, k, v, options.sinks)
    return (out, *grads[:3]), grads[3]


def one_device(arrays, groups, options):
    q, k, v, weights, mask = arrays

    def loss(q, k, v, sinks):
        with_sinks = options.replace(sinks=sinks)
        if groups is None:
            out = attend(q, k, v, mask, with_sinks)
        else:
            out = attend_shifted(q, k, v, mask, groups, with_sinks)
        return jnp.sum(out * weights), out

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), grads = gradients(q, k, v, options.sinks)
    return (out, *grads[:3]), grads[3]


def cases():
    """All of them are slow together; each pattern, mesh and pair of head counts is in one that is
    not.
    """
    for N, K in HEADS:
        for pattern in PATTERNS:
            for mesh in MESHES:
                quick = (N, K, mesh) == (8, 2, "8") and pattern not in ("chunks", "unshifted")
                yield pytest.param(N, K, pattern, mesh, marks=() if quick else pytest.mark.slow)


@pytest.mark.sample(3)
@pytest.mark.parametrize("N,K,pattern,mesh", list(cases()))
def test_every_mode_equals_one_device(N, K, pattern, mesh):
    groups, window, anchored = PATTERNS[pattern]
    packed = pattern != "window"
    arrays = inputs(N, K, packed, window, anchored, chunks=pattern == "chunks")
    options = AttentionOptions(
        scale=0.3,
        softcap=1.5 if pattern in CAPPED else None,
        sinks=sinks_of(N) if pattern in SUNK else None,
    )
    wanted, of_sinks = one_device(arrays, groups, options)
    mesh = make_mesh(**MESHES[mesh])
    size, tensor = mesh.shape["sequence"], mesh.shape["tensor"]
    for mode in MODES:
        try:
            chosen, zigzagged, _ = choose(
                mode,
                T=T,
                size=size,
                tensor=tensor,
                N=N,
                K=K,
                H=H,
                groups=groups,
                windows=(window,),
            )
        except ConfigError as refusal:
            assert mode in ("halo", "ulysses") and "use 'auto'" in str(refusal)
            continue
        assert chosen == mode
        here = reorder(arrays, size) if zigzagged else arrays
        got = run(here, groups, Layout(mesh, mode, zigzagged), options)
        assert_equal(got, (reorder(wanted, size) if zigzagged else wanted, of_sinks))


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
        options = AttentionOptions(scale=0.1)
        return jnp.sum(attend_parallel(q, k, v, Mask(index, index), options, layout=layout) ** 2)

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


@pytest.mark.slow
def test_more_anchors_than_there_is_room_for():
    q, k, v, weights, mask = inputs(8, 2, True, 50, True)
    mask = mask.replace(anchors=jnp.ones((B, T), bool).at[:, 400:].set(False))
    # 256 tokens a device, room for 160 anchors
    many = Layout(make_mesh(fsdp=4, sequence=2), "halo")
    arrays = jax.tree.map(lambda x: jnp.concatenate([x, x]), (q, k, v, weights, mask))
    options = AttentionOptions(scale=0.3)
    assert_equal(run(arrays, None, many, options), one_device(arrays, None, options))


def test_the_choice_and_its_refusals():
    shape = dict(T=1_048_576, size=8, tensor=1, N=32, K=8, H=128)
    assert choose("auto", **shape, groups=Groups(8192, 4096), windows=(None,))[0] == "halo"
    assert choose("auto", **shape, groups=None, windows=(4096,))[0] == "halo"
    assert choose("auto", **shape, groups=None, windows=(None,))[0] == "ulysses"
    few = shape | {"N": 9, "K": 3}  # dealt to no two devices
    assert choose("auto", **few, groups=None, windows=(None,))[:2] == ("allgather", True)
    assert choose("auto", **few, groups=None, windows=(None,), gather_bytes=1e9)[:2] == (
        "ring",
        True,
    )
    assert choose("auto", **shape, groups=Groups(2**19, 2**18), windows=(None,))[0] != "halo"
    with pytest.raises(ConfigError, match="looks 896 tokens back and a device holds 128"):
        choose("halo", **shape | {"T": 1024, "N": 7}, groups=None, windows=(8192,))
    with pytest.raises(ConfigError, match="use a multiple, such as 1008"):
        choose("auto", **shape | {"T": 1001}, groups=None, windows=(None,))


def test_a_mixer_may_refuse_modes_and_zigzag_order():
    shape = dict(T=1024, size=4, tensor=1, N=9, K=3, H=64, groups=None, windows=(None,))
    assert choose("auto", **shape)[:2] == ("allgather", True)
    assert choose("auto", **shape, ordered=True)[:2] == ("allgather", False)
    refused = {"allgather": "it mixes with a recurrence"}
    assert choose("auto", **shape, refused=refused)[0] == "ring"
    with pytest.raises(ConfigError, match="'allgather' .*a recurrence; use 'auto'"):
        choose("allgather", **shape, refused=refused)
    with pytest.raises(ConfigError, match="no context-parallel mode serves this model"):
        choose("auto", **shape, refused=dict.fromkeys(MODES, "it mixes with a recurrence"))


def test_a_halo_reaches_exactly_to_the_start_of_the_group():
    assert halo_size(64, 8, window=None, group=64) == 0
    assert halo_size(64, 8, window=None, group=64, shift=32) == 32
    assert halo_size(64, 8, window=10, group=64, shift=32) == 9
    assert halo_size(48, 8, window=None, group=64) == max((i * 48) % 64 for i in range(1, 8))


def test_gathered_keys_come_back_into_the_order_of_the_row():
    row = np.arange(48)[None]
    np.testing.assert_array_equal(_in_order(jnp.asarray(zigzag(row, 4)), 4), row)


def test_a_ring_refuses_an_implementation_that_wants_tokens_in_order():
    q = jax.ShapeDtypeStruct((B, T, 8, 64), jnp.bfloat16)
    options = AttentionOptions(scale=0.3, implementation="cudnn", platform="gpu")
    with pytest.raises(UnsupportedAttention, match="cannot serve tokens that may be out of order"):
        _Ring(1, 2, options).implementation(q, q, causal(B, T))


@pytest.mark.parametrize("mode", MODES)
def test_a_named_implementation_is_the_program_of_its_choice(mode):
    q, k, v, _, mask = inputs(8, 2, True, 50, False)
    layout, options = Layout(make_mesh(sequence=8), mode), AttentionOptions(scale=0.3)

    def program(options):
        return str(
            jax.make_jaxpr(lambda q, k, v: attend_parallel(q, k, v, mask, options, layout=layout))(
                q, k, v
            )
        )

    assert program(options.replace(implementation="blockwise")) == program(options)
    with pytest.raises(UnsupportedAttention, match="'triton' cannot serve devices of platform cpu"):
        program(options.replace(implementation="triton"))
