"""Every family equals transformers and PEFT (torch, float32), beyond the original length; logits
under every RoPE kind.
"""

import numpy as np
import pytest
from families import FAMILIES, SIZES, changed, measure, our_logits, read, torch_logits, write_torch

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, every option": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32},
}
STRETCHED = [
    family
    for family in FAMILIES
    if family != "llama" and family.split()[0] in ("llama", "mistral", "qwen2", "qwen3")
]
QUICK = ("llama", "gemma2", "gemma4_text", "ministral3", "granite", "olmo2")
TABLE = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES
]


def rope_parameters(family, kind):
    parameters = {"rope_theta": 5000.0, **ROPES[kind]}
    if kind == "longrope":
        fields = SIZES | FAMILIES[family][1]
        H, rng = (
            fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"]),
            np.random.default_rng(0),
        )
        parameters |= {
            name: [float(x) for x in rng.uniform(1, 6, H // 2)]
            for name in ("short_factor", "long_factor")
        }
    return parameters


def assert_parity(folder, family, length, **fields):
    theirs = write_torch(folder, family, **fields)
    tokens = np.random.default_rng(1).integers(0, 128, size=(2, length))
    np.testing.assert_allclose(
        our_logits(read(folder)[1], tokens), torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", STRETCHED)
@pytest.mark.parametrize("kind", ROPES)
def test_logits_equal_transformers(tmp_path, family, kind):
    # beyond max_position_embeddings = 64
    assert_parity(tmp_path, family, 150, rope_parameters=rope_parameters(family, kind))


@pytest.mark.parametrize("family,kind", [("llama", "dynamic"), ("llama", "longrope")])
def test_kinds_that_depend_on_the_length_below_the_original(tmp_path, family, kind):
    assert_parity(tmp_path, family, 20, rope_parameters=rope_parameters(family, kind))


@pytest.mark.parametrize("family", TABLE)
def test_the_parity_table(tmp_path, family):
    """What scripts/bench/parity.py prints: logits, gradients of factors, weights returned, adapters
    in PEFT, the cache, GGUF.
    """
    found = measure(family, tmp_path)
    differences = [value for value in found.values() if value is not None]
    assert found["round trip"] == 0 and max(differences) <= 1e-4, found


@pytest.mark.parametrize("family", STRETCHED)
def test_weights_return_bitwise(tmp_path, family):
    write_torch(tmp_path, family)
    assert changed(*read(tmp_path)) == 0
