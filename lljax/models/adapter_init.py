"""Adapter initialization from the kernel itself; the base keeps the kernel minus the adapter.

PiSSA: Meng et al. 2024, arXiv 2404.02948: the largest singular values, by an exact decomposition or
(pissa_niter_N) by N rounds of subspace iteration from random vectors, Halko et al. 2009, arXiv
0909.4061, algorithm 4.4. OLoRA: Büyükakyüz 2024, arXiv 2406.01775: the first columns of a QR
decomposition. LoftQ: Li et al. 2023, arXiv 2310.08659, algorithm 1: the adapter approximates the
quantization error, and quantization and approximation alternate.
"""

import zlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

LOFTQ_ROUNDS = 5  # as in the paper

Factors = tuple[Float[np.ndarray, "R in"], Float[np.ndarray, "out R"]]


def first_factors(
    weight: Float[np.ndarray, "out in"],
    *,
    init: str,
    rank: int,
    scale: float,
    seed: int,
    name: str,
    quantized: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[Factors, Factors]:
    """Two pairs (A, B), float32. The run starts with the first pair; the base keeps weight - scale
    * B @ A of the second. They differ for LoftQ alone.

    A function of the arguments alone, computed on the host: a run that resumes gets the same.
    `seed` and `name` choose the random vectors. quantized: the value of a weight [out, in] after
    quantization, for LoftQ.
    """
    weight = weight.astype(np.float32)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    if init != "loftq":
        factors = _of_weight(weight, init, rank, scale, rng)
        return factors, factors
    assert quantized is not None, "LoftQ needs the quantization of the base"
    factors = (
        np.zeros((rank, weight.shape[1]), np.float32),
        np.zeros((weight.shape[0], rank), np.float32),
    )
    removed = factors
    for _ in range(LOFTQ_ROUNDS):
        a, b = removed = factors
        error = weight - quantized(weight - scale * (b @ a))
        factors = _balanced(*_leading(error, rank, 4, rng), rank, scale)
    return factors, removed


def _of_weight(
    weight: np.ndarray, init: str, rank: int, scale: float, rng: np.random.Generator
) -> Factors:
    if init == "olora":  # the first R columns alone: the others do not change the result
        q, _ = np.linalg.qr(weight[:, :rank])
        return q.T @ weight, q
    if init == "pissa":
        u, s, v = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = _leading(weight, rank, int(init.removeprefix("pissa_niter_")), rng)
    return _balanced(u, s, v, rank, scale)


def _balanced(u: np.ndarray, s: np.ndarray, v: np.ndarray, rank: int, scale: float) -> Factors:
    """A and B with scale * B @ A = u s v, truncated to the rank; each takes the root of the
    singular values.
    """
    root = np.sqrt(s[:rank] / scale)
    return root[:, None] * v[:rank], u[:, :rank] * root


def _leading(
    weight: np.ndarray, rank: int, rounds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors and values, by subspace iteration."""
    q, _ = np.linalg.qr(weight @ rng.standard_normal((weight.shape[1], rank), np.float32))
    for _ in range(rounds):
        q, _ = np.linalg.qr(weight.T @ q)
        q, _ = np.linalg.qr(weight @ q)
    u, s, v = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, v
