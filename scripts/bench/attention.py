"""Times lljax's attention against itself and JAX's own, forward and backward, on the machine at
hand.

python scripts/bench_attention.py --length=8192 --group=2048

Prints seconds a call and the ratios; each round runs all of them in turn, so that a busy machine
slows them alike.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from lljax.attention import attend, attend_shifted, causal

LENGTH = flags.DEFINE_integer("length", 8192, "Tokens of a row.")
GROUP = flags.DEFINE_integer("group", 2048, "Tokens of a group of shifted attention.")
HEADS = flags.DEFINE_integer("heads", 8, "Query heads; half as many key/value heads, of 64.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Counted calls of each.")


def main(_) -> None:
    T, N = LENGTH.value, HEADS.value
    q, k, v = (
        jax.random.normal(key, (1, T, heads, 64))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (N, N // 2, N // 2))
    )
    mask = causal(1, T)
    kinds = {
        "shifted": lambda q, k, v: attend_shifted(q, k, v, mask, group=GROUP.value, scale=0.125),
        "full": lambda q, k, v: attend(q, k, v, mask, scale=0.125),
        "jax.nn.dot_product_attention": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, scale=0.125, is_causal=True
        ),
    }
    steps = {
        name: jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2)))
        .lower(q, k, v)
        .compile()
        for name, f in kinds.items()
    }
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS.value):
        for name, step in steps.items():
            # not counted: it pays for the memory that the one before left behind
            jax.block_until_ready(step(q, k, v))
            began = time.monotonic()
            jax.block_until_ready(step(q, k, v))
            seconds[name].append(time.monotonic() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name}: {value:.2f} s")
    for above, below in (("shifted", "full"), ("full", "jax.nn.dot_product_attention")):
        ratio = statistics.median(a / b for a, b in zip(seconds[above], seconds[below]))
        print(f"{above} / {below}: {ratio:.2f}")


if __name__ == "__main__":
    app.run(main)
