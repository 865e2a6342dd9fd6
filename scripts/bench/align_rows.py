"""A prompt and its answers as rows of a step, for align.py. Without jax, for processes of peers."""

import dataclasses

import numpy as np
from common import IGNORED

ANSWERS = {"dpo": 2, "grpo": 8}  # to a prompt


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and its answers, in tokens. shared: in one row, or a row for each answer."""

    objective: str
    prompt: int
    answer: int
    shared: bool

    @property
    def answers(self) -> int:
        return ANSWERS[self.objective]

    @property
    def rows(self) -> int:
        return 1 if self.shared else self.answers

    @property
    def row_length(self) -> int:
        return self.prompt + self.answer * (self.answers if self.shared else 1)

    @property
    def visible_pairs(self) -> int:
        """Pairs of a token and a token that it sees, of all rows."""
        n, a = self.prompt, self.answer
        of_prompt, of_answer = n * (n + 1) // 2, n * a + a * (a + 1) // 2
        return (1 if self.shared else self.answers) * of_prompt + self.answers * of_answer

    def tokens(self, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens of the prompt [prompt], and of its answers [answers, answer]."""
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, vocabulary, self.prompt)
        return prompt, rng.integers(0, vocabulary, (self.answers, self.answer))

    def batch(self, vocabulary: int) -> dict[str, np.ndarray]:
        """The fields of a step, [1, rows * row_length]: rows stand one after the other."""
        prompt, answers = self.tokens(vocabulary)
        before = self.prompt - 1  # the last token of the prompt begins every branch
        trunk = {
            "tokens": prompt[:-1],
            "targets": np.full(before, IGNORED),
            "positions": np.arange(before),
            "branches": np.zeros(before),
            "segments": np.ones(before),
        }
        branches = [
            {
                "tokens": np.append(prompt[-1], answer[:-1]),
                "targets": answer,
                "positions": before + np.arange(self.answer),
                "branches": np.full(self.answer, branch),
                "segments": np.ones(self.answer),
            }
            for branch, answer in enumerate(answers, 1)
        ]
        padding = {name: np.full(1, IGNORED if name == "targets" else 0) for name in trunk}
        if self.shared:
            parts = [trunk, *branches, padding]
        else:
            parts = [part for branch in branches for part in (trunk, branch, padding)]
        return {
            name: np.concatenate([part[name] for part in parts]).astype(np.int32)[None]
            for name in trunk
        }
