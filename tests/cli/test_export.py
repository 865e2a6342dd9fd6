"""`lljax export`: what it writes, prints and refuses."""

import json
import re
import shutil

import pytest

from lljax.cli.export import main


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, two_steps):
    return shutil.copytree(two_steps, tmp_path_factory.mktemp("exported") / "run")


def refused(capsys, *flags):
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_adapter_goes_into_the_run_by_default(workdir, capsys):
    main([f"--workdir={workdir}"])
    out = workdir / "export" / "peft"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out} is written. To load it:\n") and "PeftModel" in printed
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert "--overwrite" in refused(capsys, f"--workdir={workdir}")
    main([f"--workdir={workdir}", "--overwrite"])


def test_format_folder_dtype_and_step_are_taken(workdir, tmp_path, capsys):
    flags = [f"--workdir={workdir}", "--format=merged", "--dtype=bfloat16"]
    written = []
    for step in (1, 2):
        out = tmp_path / f"step-{step}"
        main([*flags, f"--step={step}", f"--out={out}"])
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] != written[1]
    assert "3" in refused(capsys, *flags, "--step=3", f"--out={tmp_path / 'none'}")


def test_wrong_values_are_refused_before_the_run_is_read(tmp_path, capsys):
    flags = f"--workdir={tmp_path}"
    assert "is none of peft, merged, split" in refused(capsys, flags, "--format=onnx")
    assert "--dtype='int8' is none of float32" in refused(capsys, flags, "--dtype=int8")
    assert "no run was started" in refused(capsys, flags)


@pytest.mark.parametrize(
    "changes,line",
    [
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.* is missing"),
        ({"intermediate_size": 40}, "_proj.weight' has shape .*, and config.json makes it"),
    ],
)
@pytest.mark.parametrize("format", ["merged", "gguf", "fp8"])
def test_a_base_that_is_not_what_its_config_says_is_one_line(
    tmp_path, tiny, capsys, changes, line, format
):
    base = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    error = refused(capsys, f"--model={base}", f"--format={format}", f"--out={tmp_path}/out")
    assert re.search(line, error)
    assert not (tmp_path / "out").exists()
