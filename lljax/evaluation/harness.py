"""lm-evaluation-harness with lljax models (pip install -e '.[lm-eval]'): importing this module
registers the model "lljax".

python -m lljax.evaluation.harness run --model=lljax --model_args=workdir=runs/quickstart
--tasks=...
"""

# lm_eval is an extra, which a type checker need not have.
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lljax.data.render import chat_text
from lljax.data.template import adds_bos, with_template
from lljax.errors import ConfigError
from lljax.evaluation.likelihood import log_likelihoods
from lljax.generation.generate import generate
from lljax.generation.sample import Sampling
from lljax.interop.open import end_tokens, tokenizer_fingerprint
from lljax.run.open import open_base_models, open_run_models

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition",
}  # the harness's name: our name
OTHER_SETTINGS = {"until", "max_gen_toks", "do_sample"}


@register_model("lljax")
class LljaxLM(TemplateLM):
    """model_args: workdir of a run; or path of a base model and adapter, a folder in PEFT's format.

    max_length: tokens the model reads, by default its own context. batch_size: texts in a batch.
    max_gen_toks: new tokens if a task does not say.
    """

    def __init__(
        self,
        *,
        path: str = "",
        adapter: str = "",
        workdir: str = "",
        max_length: int = 0,
        batch_size: int | str = 4,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if bool(path) == bool(workdir):
            raise ConfigError(
                "model_args of lljax: name either path=BASE (optionally with adapter=FOLDER) or "
                "workdir=RUN"
            )
        candidates = (
            open_run_models(Path(workdir))
            if workdir
            else open_base_models(path, Path(adapter) if adapter else None)
        )
        self.model = candidates.models[-1].load()
        self.dtype, self.layout = candidates.dtype, candidates.layout
        base: Any = candidates.base
        self.tokenizer = with_template(base.tokenizer())
        self.stop = end_tokens(base, self.tokenizer)
        self.max_length, self.max_gen_toks = (
            int(max_length) or self.model.spec.max_length,
            int(max_gen_toks),
        )
        try:
            self.rows = int(batch_size)
        except ValueError:
            raise ConfigError(f"batch_size={batch_size!r}: lljax takes a number") from None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.tokenizer.bos_token_id if adds_bos(self.tokenizer) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return chat_text(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Adds bos if the tokenizer does, unless a chat template has already written it."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is not False and adds_bos(self.tokenizer) and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Truncates contexts from the left to `max_length`."""
        pairs = []
        for _, context, continuation in requests:
            over = max(len(context) + len(continuation) - self.max_length - 1, 0)
            if over >= len(context):
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens leaves no room for context in "
                    f"{self.max_length}: raise max_length in model_args"
                )
            pairs.append((context[over:], continuation))
        results = log_likelihoods(
            self.model, pairs, rows=self.rows, dtype=self.dtype, layout=self.layout
        )
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        pieces, owner = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                pieces.append((None, *make_disjoint_window(window)))
                owner.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owner, self._loglikelihood_tokens(pieces), strict=True):
            sums[i] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Batches requests with the same settings; truncates contexts from the left."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        texts: dict[int, str] = {}
        for members in groups.values():
            settings: Any = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            if unknown := sorted(settings.keys() - OTHER_SETTINGS - SAMPLING.keys()):
                raise ConfigError(f"generation settings of the task: {unknown[0]} is not supported")
            sampling = Sampling(
                **{
                    ours: settings[theirs]
                    for theirs, ours in SAMPLING.items()
                    if theirs in settings
                }
            )
            tokens = settings["max_gen_toks"]
            if tokens >= self.max_length:
                raise ConfigError(
                    f"max_gen_toks={tokens} leaves no room for a prompt in "
                    f"{self.max_length} tokens: "
                    "raise max_length in model_args"
                )
            read = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in members]
            prompts = [np.asarray(ids[tokens - self.max_length :], np.int32) for ids in read]
            completions = generate(
                self.model,
                prompts,
                tokens=tokens,
                sampling=sampling,
                stop=self.stop,
                stop_strings=tuple(settings["until"]),
                tokenizer=self.tokenizer,
                rows=self.rows,
                dtype=self.dtype,
                layout=self.layout,
            )
            for i, completion in zip(members, completions, strict=True):
                texts[i] = completion.text or ""
                self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
        return [texts[i] for i in range(len(requests))]


if __name__ == "__main__":
    cli_evaluate()
