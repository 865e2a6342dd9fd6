"""From the names that --tasks takes to tasks."""

from collections.abc import Sequence

from lljax.errors import ConfigError, DataError
from lljax.evaluation import longbench, longbench2, needle, passkey, ruler, zeroscrolls
from lljax.evaluation.protocols import PROTOCOLS
from lljax.evaluation.task import Sources, Task


def find(names: Sequence[str], sources: Sources, field: str = "--tasks") -> list[Task]:
    """The tasks of `names`, in their order and each once. A name is a family, such as ruler, or a
    task: ruler/vt.

    passkey stands for passkey/longlora and passkey/tokens, longbench for the tasks that are in its
    folder, ruler for the eleven that need no file and those whose file is named. field: where the
    names were given, for errors.

    Raises:
      ConfigError: there is no such task. (PROTOCOLS are named among those that there are: who calls
        takes them out first.)
      DataError: the folder of a family holds none of its files.
    """
    every = {
        **passkey.tasks(),
        "needle": needle.task(sources.haystack),
        **ruler.tasks(sources),
        **longbench.tasks(sources.longbench, sources.longbench_config),
        "longbench2": longbench2.task(sources.longbench2),
        **zeroscrolls.tasks(sources.zeroscrolls),
    }
    families = _families(every, sources)
    found: dict[str, Task] = {}
    for name in names:
        members = families.get(name, [name] if name in every else None)
        if members is None:
            family = name.split("/")[0]
            known = [
                task for task in [*PROTOCOLS, *every] if family in (task, task.split("/")[0])
            ] or [*families, *PROTOCOLS]
            raise ConfigError(f"{field}: there is no task {name!r}; known here: {', '.join(known)}")
        if not members:
            raise DataError(
                f"--longbench={sources.longbench}: the folder holds none of its files, such as "
                f"{'qasper_e' if name == 'longbench_e' else 'qasper'}.jsonl"
            )
        found |= {member: every[member] for member in members}
    return list(found.values())


def _families(every: dict[str, Task], sources: Sources) -> dict[str, list[str]]:
    of = lambda family: [name for name in every if name.startswith(f"{family}/")]
    unnamed = {
        name
        for name, path in (("ruler/qa_1", sources.squad), ("ruler/qa_2", sources.hotpotqa))
        if path is None
    }
    even = [name for name in of("longbench") if name.endswith("_e")]
    return {
        "passkey": ["passkey/longlora", "passkey/tokens"],
        "needle": ["needle"],
        "ruler": [name for name in of("ruler") if name not in unnamed],
        "longbench": [name for name in of("longbench") if name not in even],
        "longbench_e": even,
        "longbench2": ["longbench2"],
        "zeroscrolls": of("zeroscrolls"),
        "zeroscrolls_test": of("zeroscrolls_test"),
    }
