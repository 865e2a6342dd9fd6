"""Policy losses and their gradients equal TRL's own functions."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lljax.objectives.policy_losses import POLICY_LOSSES, PolicyOptions, Sampled

A, T = 6, 9
RNG = np.random.default_rng(0)
MASK = np.arange(T) < RNG.integers(1, T + 1, A)[:, None]
OLD = np.where(MASK, -RNG.exponential(1.0, (A, T)), 0).astype(np.float32)
# far enough that ratios are clipped on both sides
POLICY = np.where(MASK, OLD + RNG.normal(0, 0.5, (A, T)), 0).astype(np.float32)
REFERENCE = np.where(MASK, OLD + RNG.normal(0, 0.3, (A, T)), 0).astype(np.float32)
ADVANTAGES = np.asarray([1.0, -0.5, 2.0, -1.5, 0.0, 0.7], np.float32)
NUMBERS = np.repeat(np.arange(A), T).astype(np.int32)


def ours(name: str, policy, options: PolicyOptions):
    """The loss of answers whose tokens stand in a random order."""
    order = np.random.default_rng(1).permutation(A * T)
    sampled = Sampled(
        policy=policy.reshape(-1)[order],
        old=jnp.asarray(OLD.reshape(-1)[order]),
        reference=jnp.asarray(REFERENCE.reshape(-1)[order]),
        advantage=jnp.asarray(ADVANTAGES[NUMBERS][order]),
        answer=jnp.asarray(NUMBERS[order]),
        trained=jnp.asarray(MASK.reshape(-1)[order]),
        answers=A,
    )
    row = POLICY_LOSSES[name]
    return row.total(sampled, options) / (A if row.answers else MASK.sum())


def of_trl(torch, name: str, options: PolicyOptions):
    policy = torch.tensor(POLICY, requires_grad=True)
    entropy = torch.zeros_like(policy)
    kind = {"gspo": "grpo"}.get(name, name)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            delta=options.delta, use_bias_correction_kl=True, steps_per_generation=1
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, entropy, None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        beta=options.beta,
        loss_type=kind,
        epsilon_low=options.clip_low,
        epsilon_high=options.clip_high,
        max_completion_length=options.longest,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
    )
    mask, tokens = torch.as_tensor(MASK).float(), torch.zeros(A, T, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens[:, :2],
        "prompt_mask": tokens[:, :2],
        "completion_ids": tokens,
        "completion_mask": mask,
        "advantages": torch.as_tensor(ADVANTAGES),
        "old_per_token_logps": torch.as_tensor(OLD),
        "ref_per_token_logps": torch.as_tensor(REFERENCE),
        "num_items_in_batch": mask.sum(),
        "old_logps": torch.as_tensor((OLD * MASK).sum(1)),
    }
    if name == "rloo":
        trl = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    else:
        trl = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    loss = trl._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), policy.grad.numpy()


OPTIONS = {
    "clip": PolicyOptions(longest=20),
    "clip higher, KL": PolicyOptions(clip_high=0.28, beta=0.04, longest=20),
    "delta": PolicyOptions(clip_low=0.1, delta=1.15, longest=20),
}


# TRL's RLOO takes the KL divergence from the reward, and has no delta.
CASES = [(name, kind) for name in POLICY_LOSSES for kind in OPTIONS if name != "rloo"]


@pytest.mark.slow
@pytest.mark.parametrize("name,kind", [*CASES, ("rloo", "clip")])
def test_policy_losses_equal_trl(name, kind):
    torch, options = pytest.importorskip("torch"), OPTIONS[kind]
    value, gradient = jax.value_and_grad(lambda policy: ours(name, policy, options))(
        jnp.asarray(POLICY)
    )
    wanted, wanted_gradient = of_trl(torch, name, options)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient * MASK, wanted_gradient * MASK, atol=1e-5)


# Of the two answers below, as TRL 1.16 computes them.
VALUES = {
    "grpo": 0.17071,
    "dr_grpo": -0.04064,
    "bnpo": -0.81282,
    "dapo": -0.81282,
    "cispo": -0.88483,
    "gspo": -0.04892,
    "rloo": -0.08,
}


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_keep_their_values(name):
    sampled = Sampled(
        policy=jnp.asarray([-1.0, -2.0, -0.5, -3.0, -1.5, -0.2]),
        old=jnp.asarray([-1.4, -1.9, -0.9, -2.5, -1.45, -0.6]),
        reference=jnp.asarray([-1.2, -2.2, -0.6, -2.0, -1.0, -0.5]),
        advantage=jnp.asarray([1.0, 1.0, 1.0, -1.5, -1.5, -1.5]),
        answer=jnp.asarray([0, 0, 0, 1, 1, 1]),
        trained=jnp.asarray([1, 1, 1, 1, 1, 0], bool),
        answers=2,
    )
    beta = 0.0 if name == "rloo" else 0.04  # TRL's RLOO has it in the reward
    options = PolicyOptions(clip_high=0.28, beta=beta, longest=20)
    np.testing.assert_allclose(POLICY_LOSSES[name].total(sampled, options), VALUES[name], rtol=1e-3)


def test_equal_rewards_have_no_gradient_and_the_first_ratio_is_1():
    for name, row in POLICY_LOSSES.items():
        zeros = jnp.zeros(A * T)
        sampled = Sampled(
            policy=zeros,
            old=zeros,
            reference=None,
            advantage=zeros,
            answer=jnp.asarray(NUMBERS),
            trained=jnp.asarray(MASK.reshape(-1)),
            answers=A,
        )

        def loss(policy, sampled=sampled, row=row):
            return row.total(dataclasses.replace(sampled, policy=policy), PolicyOptions())

        assert not np.any(jax.grad(loss)(zeros)), name
        assert np.all(np.exp(row.log_ratio(sampled)) == 1), name
