"""What a run and its plan share about the answers that a policy objective writes: the longest
prompt, the dtype of its keys and values, and the two programs that write the answers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lljax.config import Config
from lljax.errors import ConfigError, counted
from lljax.generation.forked import lower_programs
from lljax.models.decoder import Decoder
from lljax.parallel.rounding import cdiv
from lljax.parallel.sharding import Layout


def cache_dtype(config: Config) -> Any:
    """The dtype of keys and values while answers are written; None for the computation's."""
    return jnp.int8 if config.rollout.cache == "int8" else None


def longest_prompt(config: Config, length: int) -> int:
    """Tokens of the longest prompt of a stage of `length` tokens: beside its answers, spread over
    the rows of a step, each with the prompt again.

    Raises:
      ConfigError: there is no room for a prompt.
    """
    rollout, training = config.rollout, config.training
    rows = training.rows * training.accumulate
    room = length - cdiv(rollout.answers, rows) * rollout.tokens + 1
    if room < 1:
        raise ConfigError(
            f"rollout.answers={rollout.answers} of rollout.tokens={rollout.tokens} tokens and the "
            f"{counted(rows, 'row')} of a step in a stage of {length} tokens leave no room for a "
            "prompt: use a longer stage, more training.accumulate, or shorter or fewer answers"
        )
    return room


def lower_rollout(
    model: Decoder, config: Config, mesh: Mesh, prompt: int
) -> dict[str, jax.stages.Lowered]:
    """The programs "read" and "write" of a rollout with prompts of `prompt` tokens, see
    lljax.generation.forked.lower_programs.

    model: abstract, with the dtype and the sharding on `mesh` of every value.
    """
    here = mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend()
    return lower_programs(
        model,
        prompt=prompt,
        answers=config.rollout.answers,
        tokens=config.rollout.tokens,
        dtype=jnp.dtype(config.model.dtype),
        cache_dtype=cache_dtype(config),
        # Without a layout, the program would be made for the platform of this process.
        layout=None if here else Layout(mesh),
    )
