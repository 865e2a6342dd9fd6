import json

import pytest

from lljax.config import default_config
from lljax.data.statistics import remarks, statistics
from lljax.data.tokens import prepare


@pytest.fixture
def said(tmp_path, tokenizer):
    def said(rows, overlong="split", lengths=(16,)):
        """The statistics of rows, and the remarks on them."""
        file, data = tmp_path / "rows.jsonl", default_config().data
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data.train = (str(file),)
        found = statistics(
            prepare(data, tokenizer, 320, tmp_path / "data", tokenizer_fingerprint="t"),
            overlong,
            lengths,
        )
        return json.loads(json.dumps(found)), remarks(found, overlong)

    return said


LATE = [{"prompt": "context " * 40 + f"{i}: ", "completion": f"answer {i}"} for i in range(20)]
SHORT = [{"prompt": "short: ", "completion": "x"}]


def test_documents_cut_off_before_their_reply_are_counted_at_each_length_and_said(said):
    found, lines = said([*LATE, *SHORT], "truncate", (16, 16, 1024))
    assert [
        (at["length"], at["documents"], at["untrained"], at["pieces"])
        for at in found["train"]["at"]
    ] == [(16, 1, 20, 1), (1024, 21, 0, 21)]
    assert lines == [
        "20 of 21 documents have no trained token within the first 16 "
        "(data.overlong='truncate'): they are "
        "left out; use 'split', or longer rows"
    ]


def test_documents_dropped_for_their_length_are_counted_and_said(said):
    found, lines = said([*LATE, *SHORT], "drop")
    assert found["train"]["at"][0]["dropped"] == 20
    assert lines[0].startswith(
        "20 of 21 documents are longer than 16 tokens (data.overlong='drop'): they are left out"
    )


def test_prompts_that_replies_do_not_see_are_said(said):
    found, lines = said([*LATE, *SHORT])
    assert found["train"]["at"][0]["documents"] == 21
    assert (
        "of the tokens are in pieces of 16 that hold no trained one" in lines[0] and len(lines) == 1
    )


def test_few_trained_tokens_are_said(said):
    _, lines = said([{"prompt": "context " * 400, "completion": "x"}], lengths=(8192,))
    assert (
        len(lines) == 1
        and lines[0].startswith("only 0.07%")
        and "data.loss_on='everything'" in lines[0]
    )


def test_unknown_keys_are_said_once_a_file(said):
    found, lines = said([{"text": "a", "id": i, "meta": {}} for i in range(3)])
    assert len(lines) == 1 and lines[0].endswith("rows.jsonl: keys that nothing reads: id (3 rows)")
    assert found["train"]["unread"].popitem()[1] == {"id": 3}


def test_nothing_is_said_of_documents_that_are_used_whole(said):
    found, lines = said([{"text": "a b c " * 30}] * 3)
    assert lines == [] and found["train"]["at"][0]["tokens"] == found["train"]["tokens"]
    assert (
        found["train"]["documents"] == found["train"]["rows"] == 3
        and found["train"]["bad_rows"] == 0
    )
