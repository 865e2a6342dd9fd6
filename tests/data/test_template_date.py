from datetime import datetime

import pytest

from lljax.data.template_date import DIRECTIVES, dated, stopped

NOW = datetime(2024, 2, 3, 14, 5, 6)


@pytest.mark.parametrize(
    "format", [*DIRECTIVES, "%d %b %Y", "%B %-d, %Y", "100%% of %A", "%%d", "no date"]
)
def test_a_stopped_template_formats_its_moment_as_strftime_does(tokenizer, monkeypatch, format):
    text = "\n  {{ strftime_now(messages[0].content) }}{% if strftime_now is defined %}!{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", stopped(text, NOW))
    shown = tokenizer.apply_chat_template([{"role": "user", "content": format}], tokenize=False)
    assert shown == f"\n  {NOW.strftime(format)}!"


def test_a_tokenizer_keeps_its_own_template_and_gets_no_clock_that_it_does_not_ask_for(
    tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    assert dated(tokenizer, tmp_path) is tokenizer and not list(tmp_path.iterdir())
    monkeypatch.setattr(
        tokenizer, "chat_template", {"default": "{{ strftime_now('%Y') }}", "tool_use": "x"}
    )
    (tmp_path / "clock").write_text(NOW.isoformat())
    fixed = dated(tokenizer, tmp_path)
    assert fixed.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "2024"
    assert tokenizer.chat_template["default"] == "{{ strftime_now('%Y') }}"
