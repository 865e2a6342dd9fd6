"""Names of --tasks."""

import pytest

from lljax.errors import ConfigError, DataError
from lljax.evaluation import registry
from lljax.evaluation.task import Sources


def test_names_of_tasks_are_families_or_single_tasks(tmp_path):
    names = lambda *asked, **sources: [
        task.name for task in registry.find(asked, Sources(**sources))
    ]
    assert names("passkey", "needle") == ["passkey/longlora", "passkey/tokens", "needle"]
    assert names("keychain") == ["keychain/2", "keychain/4"]
    assert len(names("ruler")) == 11 and names("ruler/vt", "ruler/vt") == ["ruler/vt"]
    assert len(names("ruler", squad=tmp_path / "squad.json")) == 12
    assert (
        len(names("zeroscrolls")) == len(names("zeroscrolls_test")) == 10
        and len(names("longbench")) == 21
    )
    assert names("longbench2", "passkey/landmark", "ruler/qa_1") == [
        "longbench2",
        "passkey/landmark",
        "ruler/qa_1",
    ]
    (tmp_path / "qasper.jsonl").touch()
    assert names("longbench", longbench=tmp_path) == ["longbench/qasper"]
    with pytest.raises(DataError, match="holds none of its files, such as qasper_e.jsonl"):
        names("longbench_e", longbench=tmp_path)
    with pytest.raises(
        ConfigError, match="no task 'ruler/niah'; known here: ruler/niah_single_1, "
    ):
        names("ruler/niah")
    with pytest.raises(
        ConfigError, match="no task 'rulr'; known here: passkey, needle, .*, perplexity, "
    ):
        names("rulr")
    with pytest.raises(
        ConfigError,
        match="no task 'perplexity/new'; known here: perplexity, .*, perplexity/new_tokens$",
    ):
        names("perplexity/new")
