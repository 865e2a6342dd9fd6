"""Attention, forward and backward, on this machine: seconds of shifted and full attention, and of
JAX's own.

python scripts/bench/attention.py --length=8192 --group=2048

Each round runs all of them in turn, so that a busy machine slows them alike.
"""

import statistics
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp

from lljax.attention import AttentionOptions, attend, attend_shifted, causal
from lljax.attention.pattern import Groups

HEAD, OPTIONS = 64, AttentionOptions(scale=0.125)
PAIRS = (("shifted", "full"), ("full", "jax.nn.dot_product_attention"))


def kinds(length: int, group: int) -> dict[str, Callable]:
    """The attention functions of q [1, T, N, H], k and v [1, T, K, H]."""
    mask, groups = causal(1, length), Groups(group, shift=group // 2)
    return {
        "shifted": lambda q, k, v: attend_shifted(q, k, v, mask, groups, OPTIONS),
        "full": lambda q, k, v: attend(q, k, v, mask, OPTIONS),
        "jax.nn.dot_product_attention": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, scale=OPTIONS.scale, is_causal=True
        ),
    }


def measure(length: int, group: int, heads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the gradient of each kind, by round."""
    shapes = [(1, length, n, HEAD) for n in (heads, heads // 2, heads // 2)]
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    steps = {
        name: jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), (0, 1, 2)))
        .lower(*qkv)
        .compile()
        for name, f in kinds(length, group).items()
    }
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            common.timed(step, *qkv)  # not counted: it pays for memory that another step released
            seconds[name].append(common.timed(step, *qkv)[1])
    return seconds


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--group", type=int, default=2048, help="tokens of a group")
    parser.add_argument(
        "--heads", type=int, default=8, help=f"query heads of {HEAD}; half as many key/value heads"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted calls of each")
    seconds = measure(**vars(parser.parse_args()))
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s")
    for above, below in PAIRS:
        ratios = (a / b for a, b in zip(seconds[above], seconds[below], strict=True))
        print(f"{above} / {below}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
