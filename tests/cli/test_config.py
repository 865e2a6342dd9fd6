"""`lljax config` lists the fields, for readers and for programs."""

import json
import subprocess
import sys

from lljax.cli.config import main
from lljax.config import FIELDS


def test_the_list_has_a_line_for_every_field_and_imports_no_jax():
    code = (
        "import sys\nfrom lljax.cli.config import main\n"
        "from lljax.config.flags import field_lines\n"
        "main([]); field_lines()\n"
        "assert not {'jax', 'numpy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FIELDS)
    rank = next(line for line in lines if line.startswith("lora.rank "))
    assert rank.split(maxsplit=3)[1:3] == ["int", "8"] and FIELDS["lora.rank"].comment in rank


def test_json_has_types_defaults_choices_and_identity(capsys):
    main(["--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(FIELDS)
    assert rows["lora.rank"] == {
        "name": "lora.rank",
        "type": "int",
        "default": 8,
        "comment": FIELDS["lora.rank"].comment,
        "required": False,
        "choices": None,
        "identity": True,
    }
    quantize = rows["model.quantize"]["choices"]
    assert quantize[0] == "none" and {"nf4", "int8"} <= {*quantize}
    assert rows["lora.also_train"]["choices"] == ["embed", "norm", "head"]
    assert rows["checkpoint.every_steps"]["identity"] == "if alarm.spike is 'rollback'"
    assert rows["context.rope.factor"]["type"] == "str | float"
