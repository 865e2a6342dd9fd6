"""The fields of a request -> the requests to the engine: prompts, sampling, stops, limits."""

import dataclasses
import secrets
from typing import Any

from lljax.data.template import missing_bos
from lljax.errors import ConfigError
from lljax.generation.completion import Request
from lljax.generation.sample import Sampling
from lljax.serving.chat import prompt_text, text_ids, used_tools
from lljax.serving.errors import too_long, wrong
from lljax.serving.models import Served
from lljax.serving.structured import constraint_for
from lljax.serving.tools import Form, form_of

COLDEST = 1e-5  # a lower temperature is 0: some clients mean that by it
MOST_REQUESTS = 1024  # prompts times choices in one call


@dataclasses.dataclass(frozen=True)
class Prompt:
    """text: as it was given; None for token ids. added: tokens before it that were not given."""

    ids: list[int]
    text: str | None = None
    added: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of the API. requests: `n` in a row for each prompt. form: how the reply would call
    tools; None if it has none to call.
    """

    values: dict[str, Any]
    served: Served
    prompts: list[Prompt]
    requests: list[Request]
    form: Form | None = None

    def prompt(self, index: int) -> Prompt:
        """The prompt of choice `index`."""
        return self.prompts[index // self.values["n"]]


def chat_job(values: dict[str, Any], served: Served) -> Job:
    """The work of /v1/chat/completions. Tokenizes: to be called in a thread of its own.

    Raises:
      ApiError: the conversation cannot be used, or is too long.
    """
    if values["top_logprobs"] and not values["logprobs"]:
        raise wrong("top_logprobs", "needs logprobs=true")
    text = prompt_text(served.tokenizer, values)
    limit = values["max_completion_tokens"] or values["max_tokens"]
    _check_characters(served, text, limit or 1, "messages")
    prompt = Prompt(text_ids(served.tokenizer, text))
    form = form_of(served.tokenizer.chat_template) if used_tools(values) else None
    tokens = _tokens(served, prompt, limit, "messages")
    requests = _requests(values, served, prompt, tokens, values["logprobs"])
    return Job(values, served, [prompt], requests, form)


def text_job(values: dict[str, Any], served: Served) -> Job:
    """The work of /v1/completions, as `chat_job`."""
    given, limit = values["prompt"], values["max_tokens"]
    if len(given) * values["n"] > MOST_REQUESTS:
        raise wrong("prompt", f"{len(given)} prompts with n={values['n']}: at most {MOST_REQUESTS}")
    if limit == 0 and not values["echo"]:
        raise wrong("max_tokens", "must be at least 1 without echo")
    prompts = [_prompt(served, item, limit) for item in given]
    requests = []
    for prompt in prompts:
        tokens = _tokens(served, prompt, limit, "prompt")
        requests += _requests(values, served, prompt, tokens, values["logprobs"] is not None)
    return Job(values, served, prompts, requests)


def _prompt(served: Served, given: str | list[int], limit: int) -> Prompt:
    if isinstance(given, str):
        _check_characters(served, given, limit, "prompt")
        before = missing_bos(served.tokenizer, given)
        prompt = Prompt(text_ids(served.tokenizer, given, before), given, len(before))
    else:
        prompt = Prompt(given)
        last = served.engine.spec.V - 1
        if given and not 0 <= min(given) <= max(given) <= last:
            raise wrong("prompt", f"token ids must be from 0 to {last}")
    if not prompt.ids:
        raise wrong("prompt", "is empty")
    return prompt


def _check_characters(served: Served, text: str, limit: int, param: str) -> None:
    """Refuses a text that is too long by its characters alone: tokenizing it would take long."""
    least = len(text) // served.longest_token
    if least > served.longest:
        raise too_long(least, limit, served.longest, param, least=True)


def _tokens(served: Served, prompt: Prompt, limit: int | None, param: str) -> int:
    """Tokens that may be written: `limit`, by default all that the context has room for."""
    read = len(prompt.ids)
    tokens = max(1, served.longest - read) if limit is None else limit
    if read + tokens > served.longest:
        raise too_long(read, tokens, served.longest, param)
    return tokens


def _requests(
    values: dict[str, Any], served: Served, prompt: Prompt, tokens: int, logprobs: bool
) -> list[Request]:
    """One request for each choice. Choice i of a prompt is the i-th of `generate` with its seed."""
    stop = frozenset(values["stop_token_ids"])
    # The end of text is a token like others where it is scored and nothing can follow it.
    if not (values["ignore_eos"] or (logprobs and tokens <= 1)):
        stop |= served.ends
    return [
        Request(
            prompt=prompt.ids,
            tokens=max(1, tokens),  # of 0, the one that is written is not shown
            sampling=_sampling(values),
            numbers=(number,),
            stop=stop,
            stop_strings=values["stop"],
            logprobs=logprobs,
            prompt_logprobs=logprobs and values.get("echo", False),
            adapter=served.adapter,
            constraint=constraint_for(
                values["response_format"], served.tokenizer, served.engine.spec.V
            ),
        )
        for number in range(values["n"])
    ]


def _sampling(values: dict[str, Any]) -> Sampling:
    temperature, seed = values["temperature"], values["seed"]
    try:
        return Sampling(
            temperature=0.0 if temperature < COLDEST else temperature,
            top_k=max(0, values["top_k"]),
            top_p=values["top_p"],
            min_p=values["min_p"],
            repetition=values["repetition_penalty"],
            seed=secrets.randbits(63) if seed is None else seed,
        )
    except ConfigError as error:  # the engine's limits are stricter than the table's
        raise wrong(None, str(error)) from None
