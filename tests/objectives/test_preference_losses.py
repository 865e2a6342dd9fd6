"""Preference losses and their gradients equal TRL's own functions."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.objectives.preference_losses import PAIR_LOSSES, PairOptions, Pairs, kto

P, T = 7, 12
LOSSES = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "ipo": "ipo",
    "hinge": "hinge",
    "robust": "robust",
    "apo_zero": "apo_zero",
    "sppo_hard": "sppo_hard",
    "nca_pair": "nca_pair",
    "bco_pair": "bco_pair",
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def log_probs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the tokens of 2 P answers, [2 P, T], zeros behind their ends; and the mask of tokens."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, 2 * P)[:, None]
    return np.where(mask, -rng.exponential(2.0, (2 * P, T)), 0).astype(np.float32), mask


def as_pairs(policy, reference, mask) -> Pairs:
    chosen, rejected = jnp.split(jnp.asarray(policy).sum(1), 2)
    reference_chosen, reference_rejected = jnp.split(jnp.asarray(reference).sum(1), 2)
    tokens = jnp.split(jnp.asarray(mask.sum(1), jnp.float32), 2)
    return Pairs(chosen, rejected, reference_chosen, reference_rejected, *tokens)


def stub(torch, **fields):
    """What TRL's methods read of a trainer."""
    accelerator = SimpleNamespace(
        device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x, num_processes=1
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(),
        **fields,
    )


def outputs(torch, policy, mask):
    """What TRL's methods read of a model's answer."""
    zeros = torch.zeros_like(policy)
    return SimpleNamespace(
        log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=torch.as_tensor(mask)
    )


def of_trl(torch, name, policy, reference, mask, options):
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    policy = torch.tensor(policy, requires_grad=True)
    chosen, rejected = torch.tensor(reference).sum(1).chunk(2)
    completion = torch.as_tensor(np.pad(mask, ((0, 0), (1, 0)))).long()  # a token of a prompt
    trainer = stub(
        torch,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[LOSSES[name]],
        loss_weights=[1.0],
        use_weighting=False,
        beta=options.beta,
        label_smoothing=options.label_smoothing,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    answer = outputs(torch, policy, mask)
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False)
    loss.backward()
    return loss.item(), policy.grad.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_equal_trl(torch, name):
    (policy, mask), (reference, _) = log_probs(0), log_probs(1)
    reference = np.where(mask, reference, 0)
    options = PairOptions(beta=0.3, label_smoothing=0.1 if name == "robust" else 0.0)

    def loss(policy):
        return PAIR_LOSSES[name].loss(as_pairs(policy, reference, mask), options).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(policy))
    wanted, wanted_gradient = of_trl(torch, name, policy, reference, mask, options)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient * mask, wanted_gradient * mask, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_losses_without_a_reference_equal_trl(torch, name, smoothing):
    (policy, mask), options = log_probs(2), PairOptions(0.7, smoothing, simpo_gamma=0.9)
    chosen, rejected = (jnp.asarray(part) for part in np.split(policy, 2))

    def loss(policy):
        return PAIR_LOSSES[name].loss(as_pairs(policy, jnp.zeros((2 * P, T)), mask), options)

    logps = torch.tensor(policy, requires_grad=True)
    means = logps.sum(1) / torch.as_tensor(mask).sum(1) if name != "cpo" else logps.sum(1)
    fields = {"beta": 0.7, "label_smoothing": smoothing, "simpo_gamma": 0.9, "alpha": 0.0}
    if name == "orpo":
        trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
        wanted = -trl.odds_ratio_loss(stub(torch, **fields), *means.chunk(2))[0]
    else:
        trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
        kind = "simpo" if name == "simpo" else "sigmoid"
        wanted = trl.cpo_loss(stub(torch, loss_type=kind, **fields), *means.chunk(2))[0]
    wanted.sum().backward()
    assert len(chosen) == len(rejected) == P
    np.testing.assert_allclose(loss(jnp.asarray(policy)), wanted.detach(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda policy: loss(policy).sum())(jnp.asarray(policy))
    np.testing.assert_allclose(gradient * mask, logps.grad.numpy() * mask, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0], ids=["kl below 0", "kl about 0", "kl above 0"])
def test_kto_equals_trl(torch, shift):
    trl = pytest.importorskip("trl.trainer.kto_trainer")
    (policy, mask), (reference, _) = log_probs(3), log_probs(4)
    reference = np.where(mask, reference, 0).sum(1)
    desirable = np.arange(2 * P) % 3 > 0
    of_kl = np.random.default_rng(5).normal(shift, 1, 2 * P).astype(np.float32)
    logps = torch.tensor(policy, requires_grad=True)
    completion = torch.as_tensor(np.pad(mask, ((0, 0), (1, 0)))).long()
    trainer = stub(
        torch,
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        calculate_KL=True,
    )
    trainer._compute_kl_logps = lambda model, batch: torch.as_tensor(of_kl)
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "completion_mask": completion,
        "attention_mask": torch.ones_like(completion),
        "label": torch.as_tensor(desirable),
        "ref_logps": torch.as_tensor(reference),
        "ref_KL_logps": torch.zeros(2 * P),
    }
    answer = outputs(torch, logps, mask)
    wanted = trl.KTOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False)
    wanted.backward()

    def loss(policy):
        ratios = policy.sum(1) - reference
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
        kl = jnp.asarray(of_kl).mean()
        return kto(ratios, jnp.asarray(desirable), kl, beta=0.2, **weights).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(policy))
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient * mask, logps.grad.numpy() * mask, atol=1e-5)


# Of the three pairs below, as TRL 1.16 computes them.
VALUES = {
    "dpo": [0.43749, 0.38687, 2.21552],
    "dpo_norm": [0.62792, 0.55436, 0.82126],
    "ipo": [1.48028, 0.44444, 6.11188],
    "hinge": [0.4, 0.25, 3.1],
    "robust": [0.36249, 0.29312, 2.47802],
    "apo_zero": [0.85111, 0.81492, 1.46323],
    "sppo_hard": [0.88889, 0.47222, 57.88889],
    "nca_pair": [1.25871, 1.24205, 2.32086],
    "bco_pair": [1.10871, 1.0476, 2.7389],
    "orpo": [0.20794, 0.13835, 0.31378],
    "simpo": [1.15115, 1.06187, 1.26114],
    "cpo": [0.43115, 0.89825, 2.24684],
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_keep_their_values(name):
    pairs = Pairs(
        chosen=jnp.asarray([-12.0, -7.5, -30.0]),
        rejected=jnp.asarray([-15.0, -6.0, -22.0]),
        reference_chosen=jnp.asarray([-13.0, -9.0, -25.0]),
        reference_rejected=jnp.asarray([-14.0, -5.0, -24.0]),
        chosen_tokens=jnp.asarray([4.0, 3.0, 9.0]),
        rejected_tokens=jnp.asarray([5.0, 2.0, 8.0]),
    )
    smoothing = 0.0 if name in ("dpo", "dpo_norm") else 0.1  # TRL's DPO has none
    options = PairOptions(beta=0.3, label_smoothing=smoothing, simpo_gamma=0.9)
    losses = PAIR_LOSSES[name].loss(pairs, options)
    np.testing.assert_allclose(losses, VALUES[name], rtol=1e-4)


def test_kto_keeps_its_values():
    ratios, desirable = jnp.asarray([2.0, -1.0, 3.0, -4.0]), jnp.asarray([1, 1, 0, 0], bool)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    losses = kto(ratios, desirable, jnp.float32(0.5), beta=0.2, **weights)
    np.testing.assert_allclose(losses, [0.55322, 0.74678, 0.37348, 0.17343], rtol=1e-4)


def test_dpo_starts_at_log_2():
    (policy, mask) = log_probs(6)
    pairs = as_pairs(policy, policy, mask)
    np.testing.assert_allclose(PAIR_LOSSES["dpo"].loss(pairs, PairOptions()), np.log(2), rtol=1e-6)


def test_conservative_dpo_is_dpo_with_some_labels_swapped():
    (policy, mask), (reference, _) = log_probs(7), log_probs(8)
    pairs = as_pairs(policy, reference, mask)
    swapped = dataclasses.replace(
        pairs,
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
    )
    plain, some = PairOptions(), PairOptions(label_smoothing=0.25)
    dpo = PAIR_LOSSES["dpo"].loss
    wanted = 0.75 * dpo(pairs, plain) + 0.25 * dpo(swapped, plain)
    np.testing.assert_allclose(dpo(pairs, some), wanted, rtol=1e-5)
