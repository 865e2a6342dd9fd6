"""The tasks that --tasks names: a table of families."""

import dataclasses
from collections.abc import Callable, Sequence

from lljax.errors import ConfigError, DataError
from lljax.evaluation import keychain, longbench, longbench2, needle, passkey, ruler, zeroscrolls
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.task import Sources, Task

Tasks = dict[str, Task]


def _all(tasks: Tasks, sources: Sources) -> list[str]:
    return list(tasks)


@dataclasses.dataclass(frozen=True)
class Family:
    """tasks(sources): the family's tasks by name. members(tasks, sources): the tasks that the
    family's name alone stands for.
    """

    tasks: Callable[[Sources], Tasks]
    members: Callable[[Tasks, Sources], list[str]] = _all


def _longbench(even: bool) -> Family:
    """LongBench, or LongBench-E (`even`), whose tasks end in _e."""

    def tasks(sources: Sources) -> Tasks:
        both = longbench.tasks(sources.longbench, sources.longbench_config)
        return {name: task for name, task in both.items() if name.endswith("_e") == even}

    return Family(tasks)


def _zeroscrolls(family: str) -> Family:
    def tasks(sources: Sources) -> Tasks:
        both = zeroscrolls.tasks(sources.zeroscrolls)
        return {name: task for name, task in both.items() if name.startswith(f"{family}/")}

    return Family(tasks)


def _ruler_members(tasks: Tasks, sources: Sources) -> list[str]:
    """All tasks, except those whose file is not named."""
    files = {"ruler/qa_1": sources.squad, "ruler/qa_2": sources.hotpotqa}
    return [name for name in tasks if name not in files or files[name] is not None]


FAMILIES = {
    "passkey": Family(
        tasks=lambda sources: passkey.tasks(),
        members=lambda tasks, sources: ["passkey/longlora", "passkey/tokens"],
    ),
    "needle": Family(lambda sources: {"needle": needle.task(sources.haystack)}),
    "keychain": Family(lambda sources: keychain.tasks(sources.haystack)),
    "ruler": Family(ruler.tasks, members=_ruler_members),
    "longbench": _longbench(even=False),
    "longbench_e": _longbench(even=True),
    "longbench2": Family(lambda sources: {"longbench2": longbench2.task(sources.longbench2)}),
    "zeroscrolls": _zeroscrolls("zeroscrolls"),
    "zeroscrolls_test": _zeroscrolls("zeroscrolls_test"),
}


def find(names: Sequence[str], sources: Sources, field: str = "--tasks") -> list[Task]:
    """The tasks of `names`, in their order and without repetition. A name is a family, such as
    ruler, or a task: ruler/vt.

    field: the field or flag that holds the names, for errors.

    Raises:
      ConfigError: a task does not exist. (The message also lists PROTOCOLS, which the caller takes
        out first.)
      DataError: the folder of a family holds none of its files.
    """
    by_family = {name: family.tasks(sources) for name, family in FAMILIES.items()}
    tasks = {name: task for family in by_family.values() for name, task in family.items()}
    chosen: Tasks = {}
    for name in names:
        if name in FAMILIES:
            members = FAMILIES[name].members(by_family[name], sources)
        elif name in tasks:
            members = [name]
        else:
            raise ConfigError(
                f"{field}: there is no task {name!r}; known here: {', '.join(_known(name, tasks))}"
            )
        if not members:
            raise DataError(
                f"--longbench={sources.longbench}: the folder holds none of its files, such as "
                f"{'qasper_e' if name == 'longbench_e' else 'qasper'}.jsonl"
            )
        chosen |= {member: tasks[member] for member in members}
    return list(chosen.values())


def _known(name: str, tasks: Tasks) -> list[str]:
    """The tasks of the family of `name`, or the families if there is no such family."""
    family = name.split("/")[0]
    names = [task for task in [*PROTOCOLS, *tasks] if family in (task, task.split("/")[0])]
    return names or [*FAMILIES, *PROTOCOLS]
