"""First values of the factors that are taken from the kernel itself; the kernel keeps the rest.

PiSSA: Meng et al. 2024, arXiv 2404.02948: the largest singular values, by an exact decomposition or
  (pissa_niter_N) by N rounds of subspace iteration from random vectors, Halko et al. 2009, arXiv
  0909.4061, algorithm 4.4. OLoRA: Büyükakyüz 2024, arXiv 2406.01775: the first columns of a QR
  decomposition. LoftQ: Li et al. 2023, arXiv 2310.08659, algorithm 1: what quantising loses, in
  turns with quantising what the factors leave.
"""

import zlib

import numpy as np

TURNS = 5  # of LoftQ, as in the paper


def first_factors(
    weight: np.ndarray, *, init: str, rank: int, scale: float, seed: int, name: str, quantised=None
):
    """Two pairs (A [R, in], B [out, R]), float32, of a weight [out, in]: with the first the run
    begins, and what the kernel keeps is weight - scale * B @ A of the second.

    A function of the arguments alone, computed on the host: a run that resumes gets the same.
      `seed` and `name` choose the random vectors. quantised: the value of a weight [out, in] once
      it is quantised, for LoftQ; for the others the pairs are the same.
    """
    weight, rng = (
        weight.astype(np.float32),
        np.random.default_rng((seed, zlib.crc32(name.encode()))),
    )
    if init == "loftq":
        first = (
            np.zeros((rank, weight.shape[1]), np.float32),
            np.zeros((weight.shape[0], rank), np.float32),
        )
        for _ in range(TURNS):
            a, b = taken = first
            first = _evenly(
                *_leading(weight - quantised(weight - scale * (b @ a)), rank, 4, rng), rank, scale
            )
        return first, taken
    first = _of_weight(weight, init, rank, scale, rng)
    return first, first


def _of_weight(weight, init, rank, scale, rng):
    if init == "olora":  # of the first R columns alone: the others do not change them
        q, _ = np.linalg.qr(weight[:, :rank])
        return q.T @ weight, q
    if init == "pissa":
        u, s, v = np.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = _leading(weight, rank, int(init.removeprefix("pissa_niter_")), rng)
    return _evenly(u, s, v, rank, scale)


def _evenly(u, s, v, rank, scale):
    """A and B with scale * B @ A = u s v, cut to the rank; each takes the root of the singular
    values.
    """
    root = np.sqrt(s[:rank] / scale)
    return root[:, None] * v[:rank], u[:, :rank] * root


def _leading(weight, rank: int, rounds: int, rng):
    q, _ = np.linalg.qr(weight @ rng.standard_normal((weight.shape[1], rank), np.float32))
    for _ in range(rounds):
        q, _ = np.linalg.qr(weight.T @ q)
        q, _ = np.linalg.qr(weight @ q)
    u, s, v = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, v
