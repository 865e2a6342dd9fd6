"""The models that the server offers, by name."""

import dataclasses
import time
from typing import Any

from lljax.errors import short
from lljax.serving.errors import ApiError, wrong
from lljax.serving.logprobs import TokenTexts


@dataclasses.dataclass(frozen=True)
class Served:
    """One name that requests may use.

    engine: answers; several models may share it. adapter: its name in the engine; None for the
      engine's model as it is.
    ends: tokens that end an answer. longest: tokens of a prompt and its completion.
    texts: of single tokens. longest_token: characters in a token, at most.
    root: where the weights come from. parent: the name of the base of an adapter.
    loaded: at run time, so that it may be unloaded.
    """

    name: str
    engine: Any
    tokenizer: Any
    ends: frozenset[int]
    longest: int
    texts: TokenTexts
    longest_token: int
    adapter: str | None = None
    root: str = ""
    parent: str | None = None
    loaded: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def body(self) -> dict[str, Any]:
        """Its entry in /v1/models; max_model_len is vLLM's name for the context length."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "lljax",
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.longest,
        }


def served(name: str, engine: Any, tokenizer: Any, *, ends: frozenset[int], **more: Any) -> Served:
    """A Served with what follows from its tokenizer; `more`: other fields."""
    longest_token = max(map(len, tokenizer.get_vocab()))
    texts = TokenTexts(tokenizer)
    tokenizer("a")  # settles truncation and padding, which threads may not do side by side
    return Served(name, engine, tokenizer, ends, texts=texts, longest_token=longest_token, **more)


class Models:
    """A table of models by name, in the order in which they were added."""

    def __init__(self, *models: Served):
        self._models = {model.name: model for model in models}

    def __iter__(self):
        return iter(list(self._models.values()))

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def engines(self) -> list[Any]:
        return list({id(model.engine): model.engine for model in self}.values())

    def get(self, name: str | None) -> Served:
        """The model of a request, which may leave out the name of the only one.

        Raises:
          ApiError: there is no such model, or no name and several models.
        """
        if name is None and len(self._models) == 1:
            return next(iter(self))
        if name is None:
            raise wrong("model", f"is missing: one of {self._listed()}")
        if name not in self._models:
            raise ApiError(
                404,
                f"the model {short(name)} does not exist: there are {self._listed()}",
                code="model_not_found",
                param="model",
            )
        return self._models[name]

    def add(self, model: Served) -> None:
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        del self._models[name]

    def _listed(self) -> str:
        return ", ".join(self._models)
