import pytest

from lljax.config import validate
from lljax.config.yaml import read
from lljax.errors import ConfigError

RUN = """
model: base
context_length: 1024
scheduler: {total_steps: 5}
dataset: {train: data.jsonl}
"""


def config_of(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(RUN + text)
    return read(str(path))


@pytest.mark.parametrize(
    "text,name",
    [
        ("rlhf_type: dpo", "dpo"),
        ("rlhf_type: dpo\nloss_type: sigmoid_norm", "dpo_norm"),
        ("rlhf_type: dpo\nloss_type: apo_zero\nbeta: 5e-2", "apo_zero"),
        ("rlhf_type: simpo\nsimpo_gamma: 1.0", "simpo"),
        ("rlhf_type: kto\ndesirable_weight: 2.0", "kto"),
        ("rlhf_type: grpo", "grpo"),
        ("rlhf_type: grpo\nloss_type: dapo\noverlong_filter: true", "dapo"),
        ("rlhf_type: grpo\nimportance_sampling_level: sequence\nepsilon: 3e-4", "gspo"),
        ("rlhf_type: rloo", "rloo"),
    ],
)
def test_the_objectives_of_ms_swift(text, name, tmp_path):
    c = config_of(tmp_path, text)
    assert c.objective.name == name and c.data.overlong == "drop"
    validate(c)


def test_the_fields_of_a_policy(tmp_path):
    c = config_of(
        tmp_path,
        "rlhf_type: grpo\nbeta: 0.04\nnum_generations: 4\nmax_completion_length: 64\n"
        "epsilon_high: 0.28\nnum_iterations: 2\ntemperature: 0.9\nlog_completions: true\n"
        "reward_funcs: [contains, soft_overlong]\nreward_weights: [1.0, 2]\n"
        "truncation_strategy: middle\n",
    )
    assert (c.objective.kl_beta, c.objective.beta) == (0.04, 0.1)
    assert (c.rollout.answers, c.rollout.tokens, c.rollout.updates) == (4, 64, 2)
    assert (c.rollout.temperature, c.rollout.log) == (0.9, "texts")
    assert c.objective.clip_high == 0.28 and c.data.overlong == "truncate"
    assert c.reward.functions == (("contains", 1.0), ("overlong", 2.0))


@pytest.mark.parametrize(
    "text,message",
    [
        ("loss_type: dapo", "loss_type='dapo' and no rlhf_type"),
        ("beta: 0.1", "beta=0.1 and no rlhf_type"),
        ("rlhf_type: ppo", "rlhf_type='ppo' is none of dpo"),
        ("rlhf_type: dpo\nloss_type: dapo", "loss_type='dapo' is none of sigmoid"),
        ("rlhf_type: dpo\nbeta: much", "beta='much' is no number"),
        ("rlhf_type: dpo\nimportance_sampling_level: sequence", "rlhf_type: grpo"),
        ("rlhf_type: grpo\nreward_funcs: [contains]\nreward_weights: [1, 2]", "a weight for each"),
        ("rlhf_type: grpo\ntruncation_strategy: left", "is none of delete, middle"),
        ("rlhf_type: grpo\nnum_generation: 4", "did you mean 'num_generations'"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, text)
