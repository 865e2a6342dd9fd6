import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.objectives.token_loss import cross_entropy, token_entropies, token_log_probs
from lljax.parallel.sharding import Layout, make_mesh


def make(B=2, T=37, D=16, V=50, ignored=0.3, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, V, size=(B, T))
    targets[rng.random((B, T)) < ignored] = -100
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
        jnp.asarray(targets, jnp.int32),
    )


def dense_log_probs(hidden, head, targets, softcap=None):
    logits = hidden @ head.T
    logs = jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))
    picked = jnp.take_along_axis(logs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.where(targets == -100, 0, picked)


def dense(hidden, head, targets, softcap=None):
    return -jnp.sum(dense_log_probs(hidden, head, targets, softcap))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "chunk,softcap", [(1, None), (8, None), (10, None), (1024, None), (10, 3.0)]
)
def test_equals_the_dense_loss_and_its_gradients(chunk, softcap):
    hidden, head, targets = make()
    ours = lambda h, w: 3 * cross_entropy(h, w, targets, chunk=chunk, softcap=softcap)
    theirs = lambda h, w: 3 * dense(h, w, targets, softcap)
    for got, wanted in zip(
        *(jax.value_and_grad(f, (0, 1))(hidden, head) for f in (ours, theirs)), strict=True
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted
        )


@pytest.mark.parametrize("devices", [1, 4])
def test_a_low_rank_update_is_as_if_it_were_in_the_head(devices):
    hidden, head, targets = make(T=36)
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 3), (50, 3)))
    layout = (
        None if devices == 1 else Layout(make_mesh(sequence=2, tensor=2, devices=jax.devices()[:4]))
    )

    @jax.jit
    def ours(hidden, a, b):
        return cross_entropy(hidden, head, targets, chunk=7, layout=layout, update=(hidden @ a, b))

    got = jax.value_and_grad(ours, (0, 1, 2))(hidden, a, b)
    wanted = jax.value_and_grad(lambda h, a, b: dense(h, head + b @ a.T, targets), (0, 1, 2))(
        hidden, a, b
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_ignored_targets_give_exactly_nothing():
    hidden, head, targets = make()
    gradient = jax.grad(lambda h: cross_entropy(h, head, targets, chunk=8))(hidden)
    assert not np.any(gradient[np.asarray(targets) == -100])
    other = jnp.where((targets == -100)[..., None], 1e3, hidden)
    assert cross_entropy(hidden, head, targets, chunk=8) == cross_entropy(
        other, head, targets, chunk=8
    )


def test_no_target_at_all_is_zero():
    hidden, head, targets = make(ignored=1.1)
    value, gradients = jax.value_and_grad(
        lambda h, w: cross_entropy(h, w, targets, chunk=8), (0, 1)
    )(hidden, head)
    assert value == 0 and not any(np.any(g) for g in gradients)


def test_a_tied_head_gets_both_gradients():
    """The embedding is read at the input and at the output, as in a tied model."""
    _, head, targets = make()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, targets.shape))

    def tied(loss):
        return jax.grad(lambda w: loss(jnp.tanh(w[tokens]), w, targets))(head)

    np.testing.assert_allclose(
        tied(lambda *a: cross_entropy(*a, chunk=8)), tied(dense), rtol=2e-5, atol=2e-5
    )


def test_neither_logits_of_every_token_nor_a_frozen_heads_gradient_exist():
    hidden, head, targets = make(B=1, T=512, V=4096)

    def temporaries(f, *arguments):
        return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    logits = 512 * 4096 * 4
    assert (
        temporaries(jax.grad(lambda h: cross_entropy(h, head, targets, chunk=32)), hidden)
        < logits / 4
    )

    def program(which):
        return str(
            jax.make_jaxpr(jax.grad(lambda h, w: cross_entropy(h, w, targets, chunk=32), which))(
                hidden, head
            )
        )

    assert "512,4096" not in program(0)
    assert "f32[4096,16] = dot_general" in program(
        (0, 1)
    ) and "f32[4096,16] = dot_general" not in program(0)


def test_bfloat16_sums_in_float32():
    hidden, head, targets = make(T=512)
    half = cross_entropy(hidden.astype(jnp.bfloat16), head, targets, chunk=64)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, dense(hidden, head, targets), rtol=5e-3)


def test_capped_logits_of_a_head_that_is_spread_over_devices():
    """50 rows on 4 devices: the padding of the last slice is far beyond the cap."""
    hidden, head, targets = make(T=32)
    layout = Layout(make_mesh(sequence=4, devices=jax.devices()[:4]), "ring")

    def value_and_gradients(layout):
        def loss(hidden, head):
            return cross_entropy(hidden, head, targets, chunk=8, softcap=2.0, layout=layout)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)

    got, wanted = value_and_gradients(layout), value_and_gradients(None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)


LAYOUTS = {
    "one device": None,
    "sequence 2, tensor 2": Layout(
        make_mesh(sequence=2, tensor=2, devices=jax.devices()[:4]), "ring"
    ),
    "data 2, sequence 2": Layout(make_mesh(data=2, sequence=2, devices=jax.devices()[:4]), "ring"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk,softcap", [(7, None), (10, 3.0), (1024, None)])
def test_log_probabilities_and_their_gradients_equal_the_dense_ones(layout, chunk, softcap):
    """Under weights of the tokens of either sign, with an update of the head and rows of odd
    length, which a mesh cuts evenly.
    """
    hidden, head, targets = make(T=37 if LAYOUTS[layout] is None else 36)
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((16, 3), (50, 3)))
    weights = jnp.asarray(rng.normal(size=targets.shape), jnp.float32)

    @jax.jit
    def ours(hidden, head, a, b):
        got = token_log_probs(
            hidden,
            head,
            targets,
            chunk=chunk,
            softcap=softcap,
            layout=LAYOUTS[layout],
            update=(hidden @ a, b),
        )
        assert got.shape == targets.shape and got.dtype == jnp.float32
        return jnp.sum(weights * got), got

    def wanted(hidden, head, a, b):
        log_probs = dense_log_probs(hidden, head + b @ a.T, targets, softcap)
        return jnp.sum(weights * log_probs), log_probs

    got, wanted = (
        jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True)(hidden, head, a, b)
        for f in (ours, wanted)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_the_gradient_of_log_probabilities_never_holds_the_logits_of_every_token():
    hidden, head, targets = make(B=1, T=512, V=4096)
    weights = jnp.linspace(-1, 1, 512)[None]

    def total(hidden, head):
        return jnp.sum(weights * token_log_probs(hidden, head, targets, chunk=32))

    compiled = jax.jit(jax.grad(total)).lower(hidden, head).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 4096 * 4 / 4
    assert "f32[4096,16] = dot_general" not in str(jax.make_jaxpr(jax.grad(total))(hidden, head))


def test_ignored_targets_have_log_probability_0_and_no_gradient():
    hidden, head, targets = make()
    log_probs, pull = jax.vjp(lambda h: token_log_probs(h, head, targets, chunk=8), hidden)
    ignored = np.asarray(targets) == -100
    assert not np.any(log_probs[ignored]) and (log_probs[~ignored] < 0).all()
    assert not np.any(pull(jnp.ones_like(log_probs))[0][ignored])


def divided(hidden, head, softcap, temperature):
    logits = hidden @ head.T
    return (logits if softcap is None else softcap * jnp.tanh(logits / softcap)) / temperature


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_temperature_divides_the_logits_after_the_cap(softcap, devices):
    hidden, head, targets = make(T=36)
    layout = (
        None if devices == 1 else Layout(make_mesh(sequence=2, tensor=2, devices=jax.devices()[:4]))
    )

    def ours(hidden, head):
        logs = token_log_probs(
            hidden, head, targets, chunk=7, softcap=softcap, temperature=0.7, layout=layout
        )
        return jnp.sum(jnp.sin(logs))  # every token has a weight of its own

    def theirs(hidden, head):
        logs = jax.nn.log_softmax(divided(hidden, head, softcap, 0.7))
        picked = jnp.take_along_axis(logs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return jnp.sum(jnp.sin(jnp.where(targets == -100, 0, picked)))

    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head) for f in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("softcap,temperature", [(None, 1.0), (3.0, 0.5)])
def test_entropies_are_of_the_whole_distribution_and_have_no_gradient(
    softcap, temperature, devices
):
    hidden, head, targets = make(T=36)
    layout = (
        None if devices == 1 else Layout(make_mesh(sequence=2, tensor=2, devices=jax.devices()[:4]))
    )

    def ours(hidden, head):
        return token_entropies(
            hidden,
            head,
            targets,
            chunk=7,
            softcap=softcap,
            temperature=temperature,
            layout=layout,
        )

    p = jax.nn.softmax(divided(hidden, head, softcap, temperature))
    wanted = jnp.where(targets == -100, 0, -jnp.sum(p * jnp.log(p), -1))
    np.testing.assert_allclose(jax.jit(ours)(hidden, head), wanted, rtol=2e-5, atol=2e-5)
    grad = jax.jit(jax.grad(lambda *x: jnp.sum(ours(*x)), (0, 1)))(hidden, head)
    assert not any(jnp.any(g) for g in grad)
