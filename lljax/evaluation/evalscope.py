"""LongBench, ZeroSCROLLS and RULER as benchmarks of EvalScope (pip install -e '.[evalscope]'):
importing this module registers `longbench`, `zeroscrolls` and `ruler`.

python -m lljax.evaluation.evalscope eval --model=base --api-url=http://127.0.0.1:8000/v1
--datasets=ruler --dataset-args='{"ruler": {"extra_params": {"tokenizer_path": "..."}}}'

Rows, prompts, truncation, new tokens and scores are those of `lljax evaluate`. Prompts are sent as
token ids to /v1/completions: a base model has no chat template, and with `chat` the template of the
tokenizer is rendered here, so that the answer can begin with the prefix of the task.
"""

# evalscope is an extra, which a type checker need not have.
# pyright: reportMissingImports=false

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import openai
from evalscope.api.benchmark import BenchmarkMeta, DefaultDataAdapter
from evalscope.api.dataset import DatasetDict, Sample, build_dataset_from_records
from evalscope.api.evaluator import TaskState
from evalscope.api.messages import ChatMessageUser
from evalscope.api.messages.perf_metrics import PerformanceMetrics
from evalscope.api.metric import AggScore, SampleScore, Score
from evalscope.api.model import Model, ModelOutput, ModelUsage
from evalscope.api.registry import register_benchmark
from evalscope.cli.cli import run_cmd
from evalscope.constants import Tags
from evalscope.models.openai_compatible import NON_RETRYABLE_OPENAI_ERRORS, OpenAICompatibleAPI
from evalscope.utils.function_utils import retry_call
from evalscope.utils.logger import get_logger

from lljax.data.template import with_template
from lljax.errors import ConfigError, DataError, exit_cleanly, first_line, short
from lljax.evaluation import longbench, registry, ruler, zeroscrolls
from lljax.evaluation.batched_generation import EvalSettings
from lljax.evaluation.task import Example, Sources, Task, TooShort
from lljax.interop.open import open_base
from lljax.report.numbers import short_length

METRIC = "normalized_score"  # EvalScope's name for a score from 0 to 1
OPTIONS = {"timeout", "extra_headers", "extra_query"}  # of the client; the rest is the body
ARGUMENTS = {"subset_list", "extra_params", "filters"}  # of --dataset-args; the rest is refused
PARAMETERS = {
    "tokenizer_path": (
        "str",
        "Base whose tokenizer fits prompts: folder, GGUF file or hub id.",
        "",
    ),
    "lengths": ("list[int]", "Tokens of a prompt and its answer.", [4096]),
    "chat": ("bool", "Ask through the chat template of the tokenizer.", False),
    "seed": ("int", "Seed of generated rows.", 0),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A family of lljax.evaluation.registry in EvalScope.

    subsets: its tasks. folder: whether `local_path` names the folder of its files, which is then
    the field `name` of Sources. files: further files of Sources, which are extra_params.
    """

    name: str
    title: str
    paper: str
    subsets: Iterable[str]
    folder: bool = True
    files: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark(
        name="longbench",
        title="LongBench",
        paper="https://arxiv.org/abs/2308.14508",
        subsets=longbench.METRICS,
        files=("longbench_config",),
    ),
    Benchmark(
        name="zeroscrolls",
        title="ZeroSCROLLS",
        paper="https://arxiv.org/abs/2305.14196",
        subsets=zeroscrolls.TASKS,
    ),
    Benchmark(
        name="ruler",
        title="RULER",
        paper="https://arxiv.org/abs/2404.06654",
        subsets=ruler.TASKS,
        folder=False,
        files=("haystack", "squad", "hotpotqa"),
    ),
)


class Meta(BenchmarkMeta):
    """Refuses what the benchmark would ignore."""

    def _update(self, args: dict) -> None:
        known = ARGUMENTS | ({"local_path"} if _named(self.name).folder else set())
        for given, names, kind in (
            (args, known, "dataset_args"),
            (args.get("extra_params") or {}, self.extra_params, "extra_params"),
        ):
            if unknown := sorted(given.keys() - names):
                raise ConfigError(
                    f"{kind} of {self.name}: there is no {unknown[0]!r}; known are "
                    f"{', '.join(sorted(names))}"
                )
        super()._update({name: value for name, value in args.items() if value})


class TaskAdapter(DefaultDataAdapter):
    """The tasks of a family at one or more lengths; a subset is a task at a length."""

    def load(self) -> tuple[DatasetDict, None]:
        """The rows that `lljax evaluate` asks.

        Raises:
          ConfigError: a parameter is missing or wrong, or a task is unknown.
          DataError: a file is missing or damaged.
        """
        parameters: Any = self.extra_params
        settings = self._settings = _settings(self.name, parameters, self.limit)
        self._tasks: dict[str, Task] = {}
        self._examples: dict[str, dict[str, Example]] = {}
        for task in registry.find(self._names(), self._sources(), f"subset_list of {self.name}"):
            for length in _lengths(self.name, parameters["lengths"]):
                subset = f"{task.name.split('/')[1]}_{short_length(length)}"
                self.category_map[subset] = f"{length} tokens"
                try:
                    examples = {row.id: row for row in settings.examples(task, length)}
                except TooShort as error:
                    get_logger().warning(str(error))
                    continue
                self._tasks[subset], self._examples[subset] = task, examples
        return DatasetDict({subset: self._dataset(subset) for subset in self._tasks}), None

    def _names(self) -> list[str]:
        config: Any = self._task_config
        given = config.dataset_args.get(self.name, {}).get("subset_list")
        return [f"{self.name}/{task}" for task in given] if given else [self.name]

    def _sources(self) -> Sources:
        benchmark, files = _named(self.name), {}
        parameters: Any = self.extra_params
        for field in benchmark.files:
            if parameters[field]:
                files[field] = Path(parameters[field])
        if benchmark.folder:
            files[self.name] = Path(self._benchmark_meta.dataset_id)
            if not self._benchmark_meta.dataset_id:
                raise ConfigError(
                    f"dataset_args of {self.name}: name the folder of its files as local_path"
                )
            if not files[self.name].is_dir():
                raise DataError(f"local_path={files[self.name]}: there is no such folder")
        return Sources(**files)

    def _dataset(self, subset: str) -> Any:
        return build_dataset_from_records(
            records=[{"example": example} for example in self._examples[subset].values()],
            sample_fields=lambda record: _sample(record["example"], subset),
            name=subset,
            location=None,
            limit=self.limit,
            repeats=self.repeats,
            shuffle=False,
            seed=None,
        )

    def _example(self, metadata: Any) -> Example:
        return self._examples[metadata["subset"]][metadata["id"]]

    def _on_inference(self, model: Model, sample: Sample) -> ModelOutput:
        """Raises ConfigError if the server refuses the request or cannot be reached."""
        if not isinstance(api := model.api, OpenAICompatibleAPI):
            raise ConfigError(f"{self.name} asks /v1/completions: use --eval-type=openai_api")
        example, config = self._example(sample.metadata), model.config
        if config.stream or (self._task_config and self._task_config.agent_config):
            raise ConfigError(f"{self.name} takes neither stream nor an agent: leave them out")
        body = {"temperature": 0.0, "max_tokens": example.tokens}
        body |= api.completion_params(config, tools=False)
        body |= body.pop("extra_body", {})
        options = {name: body.pop(name) for name in OPTIONS & body.keys()}
        start = time.monotonic()
        try:
            completion = retry_call(
                api.client.completions.create,
                retries=config.retries,
                sleep_interval=config.retry_interval or 0,
                no_retry_exceptions=NON_RETRYABLE_OPENAI_ERRORS,
                model=body.pop("model"),
                prompt=self._settings.tokens(example),
                extra_body=body,
                **options,
            )
        except openai.OpenAIError as error:
            raise ConfigError(f"{api.base_url}/completions: {first_line(error)}") from None
        return _output(completion, time.monotonic() - start)

    def match_score(
        self,
        original_prediction: str,
        filtered_prediction: str,
        reference: str,
        task_state: TaskState,
    ) -> Score:
        place: Any = task_state.metadata
        task, example = self._tasks[place["subset"]], self._example(place)
        score = task.score([filtered_prediction], [example])
        return Score(
            value={METRIC: score / 100},
            prediction=original_prediction,
            extracted_prediction=filtered_prediction,
        )

    def aggregate_scores(self, sample_scores: Sequence[SampleScore]) -> list[AggScore]:
        """The score of the whole subset, which need not be a mean over rows."""
        predictions = [each.score.extracted_prediction or "" for each in sample_scores]
        places: list[Any] = [each.sample_metadata for each in sample_scores]
        task = self._tasks[places[0]["subset"]]
        return [
            AggScore(
                score=task.score(predictions, [self._example(place) for place in places]) / 100,
                metric_name=METRIC,
                aggregation="mean",
                num=len(predictions),
                ids=[each.sample_id for each in sample_scores if each.sample_id is not None],
            )
        ]


def _named(name: str) -> Benchmark:
    return next(benchmark for benchmark in BENCHMARKS if benchmark.name == name)


def _settings(name: str, parameters: dict, limit: int | float | None) -> EvalSettings:
    """limit: of EvalScope; a share of the rows is taken when all are known."""
    if not parameters["tokenizer_path"]:
        raise ConfigError(
            f"extra_params of {name}: prompts are fitted to tokens, so name the base that is "
            "served as tokenizer_path"
        )
    for field, kind in (("chat", bool), ("seed", int)):
        if type(parameters[field]) is not kind:
            raise ConfigError(
                f"extra_params of {name}: {field}={short(parameters[field])} is not "
                f"{'true or false' if kind is bool else 'a whole number'}"
            )
    return EvalSettings(
        tokenizer=with_template(open_base(parameters["tokenizer_path"]).tokenizer()),
        samples=limit if isinstance(limit, int) else None,
        seed=parameters["seed"],
        chat=parameters["chat"],
    )


def _lengths(name: str, value: Any) -> list[int]:
    lengths = value if isinstance(value, list) else [value]
    if not lengths or not all(type(length) is int and length > 0 for length in lengths):
        raise ConfigError(
            f"extra_params of {name}: lengths={short(value)} is not a list of numbers of tokens, "
            "such as [4096]"
        )
    return sorted(set(lengths))


def _sample(example: Example, subset: str) -> Sample:
    return Sample(
        input=[ChatMessageUser(content=example.text)],
        target=list(example.answers),
        subset_key=subset,
        metadata={"id": example.id, "subset": subset},
    )


def _output(completion: Any, seconds: float) -> ModelOutput:
    choice, usage = completion.choices[0], completion.usage
    output = ModelOutput.from_content(
        completion.model, choice.text, "max_tokens" if choice.finish_reason == "length" else "stop"
    )
    output.time = seconds
    if usage:
        output.usage = ModelUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        output.message.perf_metrics = PerformanceMetrics(
            latency=seconds,
            ttft=None,
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
        )
    return output


def _register(benchmark: Benchmark) -> None:
    parameters = PARAMETERS | {
        field: ("str", f"As --{field} of lljax evaluate.", "") for field in benchmark.files
    }
    register_benchmark(
        Meta(
            name=benchmark.name,
            pretty_name=benchmark.title,
            description=f"{benchmark.title} with the rows, prompts and scores of lljax evaluate.",
            paper_url=benchmark.paper,
            tags=[Tags.LONG_CONTEXT],
            dataset_id="",
            subset_list=list(benchmark.subsets),
            metric_list=[METRIC],
            extra_params={
                name: {"type": kind, "description": text, "value": value}
                for name, (kind, text, value) in parameters.items()
            },
        )
    )(TaskAdapter)


for benchmark in BENCHMARKS:
    _register(benchmark)


if __name__ == "__main__":
    with exit_cleanly():
        run_cmd()
