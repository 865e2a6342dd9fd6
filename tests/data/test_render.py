"""Chat templates end within bounds of time and memory, or are stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
from data.templates import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from lljax.data import render as module
from lljax.data.render import Job, Rendering, TemplateError, chat_text, render
from lljax.errors import ModelError

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(template, eos="<e>")


def still_renders() -> bool:
    (rendered,) = render(tokenizer("{{ messages[1].content }}"), [Job(TALK)])
    return rendered == Rendering("a", [])


def test_renders_as_transformers_does():
    own = tokenizer(
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ eos_token }}"
        "{% generation %}x{% endgeneration %}{% endfor %}"
        "{{ tools | tojson }}{{ add_generation_prompt }}"
    )
    options = {"tools": [{"name": "\u00e9"}], "add_generation_prompt": True}
    one, marked = render(
        own, [Job(TALK, options), Job(TALK, options | {"return_assistant_tokens_mask": True})]
    )
    assert one.text == marked.text == own.apply_chat_template(TALK, tokenize=False, **options)
    assert [marked.text[start:stop] for start, stop in marked.spans] == ["x", "x"]


@pytest.mark.parametrize(
    "template,said",
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "has not ended within 1 seconds",
        ),
        (
            "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
            "writes far more|ended within",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
            "{% set n.x = n.x ~ n.x %}{% endfor %}",
            "writes far more",
        ),
    ],
)
def test_a_template_without_bounds_is_stopped(template, said, monkeypatch):
    process = module._Process()
    monkeypatch.setattr(module, "MEMORY", 1 << 28)
    monkeypatch.setattr(module, "LONGEST", 1 << 20)
    monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(module, "_PROCESS", process)
    since = time.monotonic()
    try:
        with pytest.raises(ModelError, match=said) as raised:
            render(tokenizer(template), [Job(TALK)])
        assert "\n" not in str(raised.value) and time.monotonic() - since < 60
        assert still_renders()
    finally:
        process.stop()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        "{{ messages.x.y }}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_what_a_template_raises_is_one_line(template):
    (rendered,) = render(tokenizer(template), [Job(TALK)])
    assert isinstance(rendered, TemplateError) and rendered.kind
    with pytest.raises(ModelError, match="the chat template refuses the conversation") as raised:
        chat_text(tokenizer(template), TALK)
    assert "\n" not in str(raised.value) and still_renders()


def test_text_of_a_template_is_shown_escaped():
    with pytest.raises(ModelError, match=r"\(TemplateError: \\x1b\[31mno\)"):
        chat_text(tokenizer("{{ raise_exception('\x1b[31mno\nINFO good') }}"), TALK)


def test_the_process_that_ends_is_one_line_and_the_next_rendering_starts_another():
    assert still_renders()
    os.kill(module._PROCESS._child.popen.pid, signal.SIGKILL)
    module._PROCESS._child.popen.wait()
    with pytest.raises(ModelError, match="the process of the model's chat template ended"):
        render(tokenizer("x"), [Job(TALK)])
    assert still_renders()


def test_an_interrupted_rendering_is_not_taken_for_the_next(monkeypatch):
    assert still_renders()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.Child, "_read", interrupted)
        render(tokenizer("{{ messages[0].content }}"), [Job(TALK)])
    assert still_renders()


@pytest.mark.slow
def test_the_process_ends_with_the_one_that_started_it():
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from data.templates import byte_tokenizer
from lljax.data import render
render.render(byte_tokenizer('x', eos='<e>'), [render.Job([dict(role='user', content='q')])])
print(render._PROCESS._child.popen.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as started:
        child = int(started.stdout.readline())
        started.kill()
    until = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")
