"""The process that runs reward functions, started by lljax/run/reward_workers.py.

Reads requests from stdin, pickled, and answers on stdout in JSON; both after 8 bytes of length.
Ends with its input. Imports nothing of lljax but what a reward needs.
"""

import asyncio
import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

GIVEN = ("prompts", "completions", "completion_ids")  # to every function; the rest are columns
BUILT_IN = ("lljax.evaluation.rewards", "REWARDS")
LARGEST = 3.4e38  # of float32
MARGIN = 3  # seconds that the parent has to end this process before it ends itself


class Unusable(Exception):
    """A reward that cannot be used, and why."""


class Function:
    """A reward function, its options, and `needs`: lists of columns, one of each list is needed."""

    def __init__(self, name: str, options: dict[str, Any]):
        self.options, self.needs = options, []
        if ":" in name:
            self.call = imported(name)
        else:
            built_in = getattr(importlib.import_module(BUILT_IN[0]), BUILT_IN[1])
            if name not in built_in:
                raise Unusable(
                    f"there is no reward of this name: {', '.join(built_in)}, or a function of "
                    "yours as package.module:function or path/to/file.py:function"
                )
            self.call = built_in[name].function
            self.needs += [list(built_in[name].columns)] if built_in[name].columns else []
        try:
            parameters = inspect.signature(self.call).parameters.values()
        except (TypeError, ValueError):  # some callables of C have none
            parameters = [inspect.Parameter("all", inspect.Parameter.VAR_KEYWORD)]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes = {p.name for p in named}
        known = [p.name for p in named if p.name not in GIVEN]
        for option in options:
            if option in GIVEN or (option not in known and (":" not in name or not self.takes_all)):
                raise Unusable(f"it has no option {option!r}: {', '.join(known) or 'it has none'}")
        missing = [
            p.name for p in named if p.default is p.empty and p.name not in (*GIVEN, *options)
        ]
        if ":" not in name:
            if missing:
                raise Unusable(f"it needs the options {', '.join(missing)}")
            try:  # checks the options
                self.values({key: [] for key in GIVEN} | {needed[0]: [] for needed in self.needs})
            except (TypeError, ValueError) as error:
                raise Unusable(str(error)) from None
        else:
            self.needs += [[column] for column in missing]

    def values(self, arguments: dict[str, list]) -> list[float | None]:
        """What the function returns for a batch, as a list."""
        if not self.takes_all:
            arguments = {key: value for key, value in arguments.items() if key in self.takes}
        result = self.call(**arguments, **self.options)
        if inspect.isawaitable(result):
            result = asyncio.run(awaited(result))
        if isinstance(result, (dict, set, str, bytes)):
            raise Unusable(f"returned a {type(result).__name__} in place of a list")
        return list(result)


async def awaited(result: Any) -> Any:
    return await result


def imported(name: str) -> Callable:
    """The function of "package.module:function" or "path/to/file.py:function"."""
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = os.path.abspath(place)
            if not os.path.isfile(path):
                raise Unusable("there is no such file")
            sys.path.insert(0, os.path.dirname(path))  # as for a script: modules beside it
            module_name = f"reward_file_{os.path.basename(path)[:-3]}_{abs(hash(path))}"
            spec = importlib.util.spec_from_file_location(module_name, path)
            assert spec is not None and spec.loader is not None  # the name ends in .py
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Unusable:
        raise
    except BaseException as error:
        raise Unusable(f"importing it {raised(error)}") from None
    function = module
    for part in attribute.split("."):
        function = getattr(function, part, None)
    if function is None:
        raise Unusable(f"the module has no {attribute!r}")
    if not callable(function):
        raise Unusable(f"{attribute!r} is a {type(function).__name__}, not a function")
    return function


def raised(error: BaseException) -> str:
    """What an exception was, and the line that raised it."""
    try:
        text = str(error).strip()
    except Exception:
        text = ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    place = (
        f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    )
    return f"raised {type(error).__name__}{': ' * bool(text)}{text[:300]}{place}"


def checked(values: list, answers: int) -> list[float | None]:
    """`values` as floats. Raises Unusable if there are not `answers` numbers or Nones."""
    if len(values) != answers:
        raise Unusable(f"returned {len(values)} values for {answers} completions")
    return [number(value, i) for i, value in enumerate(values)]


def number(value: Any, index: int) -> float | None:
    try:
        result = None if value is None else float(value)
    except Exception:
        result = float("inf")
    if isinstance(value, (str, bytes)) or (result is not None and abs(result) > LARGEST):
        what = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
        raise Unusable(f"returned {what} for completion {index}, not a finite number or None")
    return result


def answer(request: dict, known: dict[int, Function]) -> dict:
    """{needs} of a reward that was made, {values} of a batch, or {error} with the reason."""
    try:
        if "path" in request:
            sys.path[:] = request["path"]
            return {}
        faulthandler.dump_traceback_later(request["seconds"] + MARGIN, exit=True, file=DEVNULL)
        if "name" in request:
            function = Function(request["name"], request["options"])
            known[request["index"]] = function
            return {"needs": function.needs}
        arguments = pickle.loads(request["arguments"])
        values = known[request["index"]].values(arguments)
        return {"values": checked(values, len(arguments["completions"]))}
    except Unusable as error:
        return {"error": str(error)}
    except BaseException as error:  # of a function of the user's: SystemExit too
        return {"error": raised(error)}
    finally:
        faulthandler.cancel_dump_traceback_later()


DEVNULL = open(os.devnull, "w")


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a function that reads its input reads no requests
    os.dup2(2, 1)  # and what it prints does not mix with the answers
    known: dict[int, Function] = {}
    while header := requests.read(8):
        request = pickle.loads(requests.read(int.from_bytes(header)))
        reply = json.dumps(answer(request, known)).encode()
        sys.stdout.flush()
        answers.write(len(reply).to_bytes(8) + reply)
        answers.flush()


if __name__ == "__main__":
    main()
