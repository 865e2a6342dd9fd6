"""`lljax serve`: flags; the server itself is tested in tests/serving."""

import pytest

from lljax.cli import serve
from lljax.cli.serve import main


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--workdir=a", "--adapter=x=y"], "--adapter and --workdir"),
        (["--model=a", "--adapter=x"], "write --adapter=NAME=PATH"),
        (["--model=a", "--adapter=x=y", "--adapter=x=z"], "the name of another adapter"),
        (["--model=a", "--timeout=nan"], "--timeout=nan"),
        (["--model=a", "--chat_template=nowhere.jinja"], "it cannot be read"),
        (["--model=nowhere/at-all", "--port=0"], "no such folder"),
        (["--workdir=nowhere", "--port=0"], "no run was started there"),
        (["--model=a", "--port=100000"], "cannot listen"),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        main(flags)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and message in shown and shown.count("\n") == 1


def test_the_flags_reach_the_server(tiny, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(
        "lljax.serving.server.serve", lambda service, sock, drain: served.append((service, drain))
    )
    monkeypatch.setenv(serve.KEY, "sesame")
    main(
        [f"--model={tiny}", "--port=0", "--slots=3", "--queue=5", "--longest=20", "--drain=2"]
        + ["--prefix_cache=0", "--cache=int8", "--allow_loading", "--max_body=1000"]
    )
    ((service, drain),) = served
    limits = service.limits
    assert (limits.api_key, limits.slots, limits.queue, drain) == ("sesame", 3, 5, 2)
    assert limits.allow_loading and limits.max_body == 1000
    assert service.models.get("base").longest == 20
    assert "Serving base at http://127.0.0.1:" in capsys.readouterr().out
