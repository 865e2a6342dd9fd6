"""Runs reward functions in processes of their own, in bounded time.

A reward function is third-party code: it may loop forever, raise, print, end its process, or load
a library that takes the devices of the trainer. Nothing of it is imported here.
"""

import json
import os
import pickle
import queue
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from lljax.data.child import Child, ChildEnded
from lljax.errors import ConfigError, first_line, printable

START_SECONDS = 120  # for a process to start, and for a reward to be imported


@dataclass(frozen=True)
class Reward:
    """function: a name of `lljax.evaluation.rewards.REWARDS`, "package.module:function" or
    "path/to/file.py:function". options: keyword arguments of every call, as (name, value) pairs.
    """

    function: str
    weight: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Judged:
    """The rewards of a batch.

    values: [answers, functions]; NaN for None, and for a function that failed. failures: why, by
      the function's name, in a line.
    """

    values: Float32[np.ndarray, "A F"]
    names: tuple[str, ...]
    failures: dict[str, str] = field(default_factory=dict)


def weighted(judged: Judged, weights: Sequence[float] | np.ndarray) -> Float32[np.ndarray, " A"]:
    """The weighted sum over functions, None left out as in TRL; NaN for an answer without rewards.

    weights: one for each function.
    """
    values = judged.values * np.asarray(weights, np.float32)
    total = np.nansum(values, axis=1, dtype=np.float32)
    return np.where(np.isnan(judged.values).all(axis=1), np.float32(np.nan), total)


class _Failed(Exception):
    """A reward that gave no values, and why."""


class _Call(NamedTuple):
    """A reward function to call. index: among the rewards."""

    index: int
    reward: Reward


class RewardWorkers:
    """The reward functions of a run; a context that ends their processes.

    Called with prompts, completions and completion_ids, a list each, and the columns of the rows, a
    list each, it returns what every function gives to every completion. A function gets the
    columns as keyword arguments, and only the parameters that it has, unless it has **kwargs. An
    `async` one is awaited. Its prints go to stderr.

    A function that takes longer than `timeout` seconds is ended with its process and with what it
    keeps in memory, and imported anew for the next batch. Such a function, one that raises, ends
    its process or returns anything but a number or None for every completion is reported in
    `Judged.failures` and counts as None for the batch.

    processes: functions that run at the same time, at most. They see no accelerator through jax.

    Raises:
      ConfigError: a reward cannot be imported, has not this option, or needs another one.
    """

    def __init__(self, rewards: Sequence[Reward], *, timeout: float, processes: int = 1):
        self.rewards, self.timeout = tuple(rewards), timeout
        self.names = names_of(self.rewards)
        count = max(1, min(processes, len(self.rewards)))
        self._all = [_Worker() for _ in range(count)]
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="rewards")
        self._needs: list[list[list[str]]] = []
        try:
            for index, reward in enumerate(self.rewards):
                worker = self._all[index % count]
                self._needs.append(worker.prepare(_Call(index, reward)))
        except _Failed as failed:
            self.close()
            name = printable(self.rewards[len(self._needs)].function)
            raise ConfigError(f"reward {name}: {failed}") from None
        except BaseException:
            self.close()
            raise

    def require(self, columns: Iterable[str]) -> None:
        """Raises ConfigError if a reward needs a column that is not among `columns`, or has an
        option of such a name.
        """
        there = set(columns)
        for name, reward, needs in zip(self.names, self.rewards, self._needs, strict=True):
            for alternatives in needs:
                if not there.intersection(alternatives):
                    raise ConfigError(
                        f"reward {name} needs the column {' or '.join(alternatives)} in every row "
                        f"of the data; they have {', '.join(sorted(there)) or 'none'}"
                    )
            for option, _ in reward.options:
                if option in there:
                    raise ConfigError(
                        f"reward {name}: {option} is an option and a column of the data: rename one"
                    )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Judged:
        """Raises ConfigError as `require`."""
        self.require(columns)
        # Integers, whatever array they were: an array of jax would import jax in the process.
        ids = [np.asarray(ids).tolist() for ids in completion_ids]
        given = {"prompts": prompts, "completions": completions, "completion_ids": ids}
        arguments = {name: list(values) for name, values in (dict(columns) | given).items()}
        answers = len(arguments["completions"])
        for name, values in arguments.items():
            if len(values) != answers:
                raise ValueError(f"{name} has {len(values)} values for {answers} completions")
        packed = pickle.dumps(arguments)
        rewards = np.full((answers, len(self.rewards)), np.nan, np.float32)
        failures: dict[str, str] = {}

        def judge(call: _Call) -> None:
            worker = self._free.get()
            try:
                values = worker.values(call, packed, self.timeout)
                rewards[:, call.index] = [np.nan if v is None else v for v in values]
            except _Failed as failed:
                failures[self.names[call.index]] = str(failed)
            finally:
                self._free.put(worker)

        running = [
            self._threads.submit(judge, _Call(index, reward))
            for index, reward in enumerate(self.rewards)
        ]
        try:
            for future in running:
                future.result()
        except BaseException:  # an interrupt: the next batch needs processes without a request
            for future in running:
                future.cancel()
            for worker in self._all:
                worker.kill()
            raise
        in_order = {name: failures[name] for name in self.names if name in failures}
        return Judged(rewards, self.names, in_order)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.stop()

    def __enter__(self) -> "RewardWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def names_of(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """A distinct name for each reward: that of the function, with a number if it comes again."""
    names: list[str] = []
    for reward in rewards:
        name = base = reward.function.rpartition(":")[2]
        number = 1
        while name in names:
            number += 1
            name = f"{base}_{number}"
        names.append(name)
    return tuple(names)


class _Worker:
    """A process of reward functions, started on demand and again after it was stopped."""

    def __init__(self):
        self._child: Child | None = None
        self._ready: set[int] = set()  # indices of the rewards that the process has imported
        self._folder = os.getcwd()  # relative paths mean the same after a restart

    def prepare(self, call: _Call) -> list[list[str]]:
        """Imports a reward; the columns that it needs. Raises _Failed."""
        request = {
            "index": call.index,
            "name": call.reward.function,
            "options": dict(call.reward.options),
        }
        needs = self._ask(request, START_SECONDS)["needs"]
        self._ready.add(call.index)
        return needs

    def values(self, call: _Call, packed: bytes, seconds: float) -> list[float | None]:
        """What a reward gives to a batch, its pickled arguments. Raises _Failed."""
        if self._child is not None and not self._child.idle():  # killed since the last batch
            self.stop()
        if call.index not in self._ready:
            self.prepare(call)
        return self._ask({"index": call.index, "arguments": packed}, seconds)["values"]

    def kill(self) -> None:
        """Ends the process from another thread than the one that waits for its answer."""
        if child := self._child:
            child.kill()

    def stop(self) -> None:
        child, self._child, self._ready = self._child, None, set()
        if child is not None:
            child.stop()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict:
        try:
            child = self._child = self._child or self._start()
            reply = json.loads(child.ask(pickle.dumps(request | {"seconds": seconds}), seconds))
        except TimeoutError:
            self.stop()
            raise _Failed(f"timed out after {seconds:g} seconds") from None
        except ChildEnded as ended:
            self.stop()
            how = f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
            raise _Failed(f"its process ended ({how})") from None
        except BaseException:  # interrupts too: the next call would read this answer
            self.stop()
            raise
        if "error" in reply:
            raise _Failed(printable(reply["error"]))
        return reply

    def _start(self) -> Child:
        script = Path(__file__).with_name("reward_process.py")
        # A second process that opens the trainer's devices fails, or takes their memory.
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        try:
            child = Child([sys.executable, "-P", script], cwd=self._folder, env=environment)
        except OSError as error:
            raise _Failed(f"its process cannot be started ({first_line(error)})") from None
        path = [os.path.abspath(entry) for entry in sys.path]
        path += [self._folder] * (self._folder not in path)
        try:
            child.ask(pickle.dumps({"path": path}), START_SECONDS)
        except BaseException:
            child.stop()
            raise
        return child
