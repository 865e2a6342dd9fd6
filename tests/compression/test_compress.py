"""A model quantized into a folder: what is in it, what reads it, what an interruption costs."""

import json
import shutil

import numpy as np
import pytest
from conftest import TEXT, write_base

from lljax.cli.export import main
from lljax.compression import compress
from lljax.errors import ConfigError
from lljax.interop import export_folder, safetensors
from lljax.interop.open import open_base
from lljax.interop.safetensors import Folder

FLAGS = ("--format=w4a16", "--group=32", "--rows=3", "--length=24")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a random model whose widths 32 divides."""
    folder = tmp_path_factory.mktemp("dense") / "base"
    return write_base(folder, hidden_size=64, intermediate_size=96, head_dim=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT}" * 9}) + "\n" for i in range(9)))
    return str(path)


def export(base, data, out, *flags):
    main([f"--model={base}", f"--data={data}", *FLAGS, f"--out={out}", *flags])
    return open_base(str(out))


def content(folder):
    """Without the record, which says where the export is."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != export_folder.RECORD}


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    export(base, data, out)
    return out


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "method,layout",
    [("gptq", "compressed-tensors"), ("awq", "awq"), ("rtn", "gptq")]
    + [
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (("gptq", "gptq"), ("gptq", "awq"), ("awq", "compressed-tensors"))
    ],
)
def test_the_dense_values_of_an_export_are_near_the_base(base, data, tmp_path, method, layout):
    calibrated = [f"--data={data}", "--rows=2", "--length=24"]
    data_flags = [] if method == "rtn" else calibrated
    main(
        [
            f"--model={base}",
            "--format=w4a16",
            "--group=32",
            *data_flags,
            f"--method={method}",
            f"--layout={layout}",
            f"--out={tmp_path / 'out'}",
        ]
    )
    dense, quantized = open_base(base), open_base(str(tmp_path / "out"))
    assert set(quantized.names()) == set(dense.names())
    for name in dense.names():
        before, after = dense.read(name), quantized.read(name)
        if "proj" not in name:
            assert method == "awq" or np.array_equal(before, after), name
        elif method == "rtn":
            assert 0 < np.abs(after - before).max() < np.abs(before).max() / 7, name


def test_only_the_kernels_of_layers_are_quantized(whole, base):
    tensors, config = Folder(whole), json.loads((whole / "config.json").read_text())
    packed = {name.split(".weight_packed")[0] for name in tensors.names() if "packed" in name}
    assert packed == {
        name.removesuffix(".weight") for name in open_base(base).names() if "_proj" in name
    }
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert "lm_head" in config["quantization_config"]["ignore"]
    report = json.loads((whole / compress.REPORT).read_text())
    assert report["recipe"]["method"] == "gptq"
    assert {name for layer in report["layers"] for name in layer} == packed
    assert all(0 < row["error"] < 0.1 for layer in report["layers"] for row in layer.values())


def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(
    base, data, whole, tmp_path, monkeypatch, capsys
):
    out, written = tmp_path / "out", []
    write = compress.safetensors.write

    def killed_before(number):
        def killing(path, *arguments):
            if len(written) == number:
                raise KeyboardInterrupt
            written.append(path)
            write(path, *arguments)

        return killing

    for number in range(3):  # in each of the two layers, and before the rest
        written.clear()
        monkeypatch.setattr(compress.safetensors, "write", killed_before(min(number, 1)))
        with pytest.raises(KeyboardInterrupt):
            export(base, data, out)
        assert not out.exists()
    monkeypatch.setattr(compress.safetensors, "write", write)
    capsys.readouterr()
    export(base, data, out)
    assert "layer 1/" not in capsys.readouterr().out
    assert content(out) == content(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_export_with_other_flags_is_refused_or_begun_again(
    base, data, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(compress, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            export(base, data, out, "--seed=1")
    with pytest.raises(SystemExit, match="2"):
        export(base, data, out)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "calibration" in error and "--overwrite" in error
    export(base, data, out, "--overwrite")
    assert content(out) == content(whole)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_weight_that_is_not_finite_is_named(base, data, tmp_path, method, capsys):
    folder = tmp_path / "nan"
    shutil.copytree(base, folder)
    held = Folder(folder)
    tensors = {name: np.array(held.read(name)) for name in held.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    table = safetensors.layout(tensors.items())
    safetensors.write(folder / "model.safetensors", table, tensors.__getitem__)
    flags = [] if method == "rtn" else [f"--data={data}", "--rows=2", "--length=24"]
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                f"--model={folder}",
                "--format=w4a16",
                "--group=32",
                f"--method={method}",
                f"--out={tmp_path / 'out'}",
                *flags,
            ]
        )
    error = capsys.readouterr().err
    assert "'model.layers.1.mlp.up_proj.weight' holds values that are not finite" in error


def test_damaged_rows_are_counted_and_few_tokens_are_said(base, tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "def f(x):"}) + "\n{broken\n")
    export(base, path, tmp_path / "out")
    assert "1 rows of the documents could not be used" in caplog.text
    assert "fewer than the 96 inputs" in caplog.text
    report = json.loads((tmp_path / "out" / compress.REPORT).read_text())
    assert report["calibration"]["tokens"] < 96
    path.write_text("{broken\n")
    with pytest.raises(SystemExit):
        export(base, path, tmp_path / "none")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_two_processes_do_not_write_the_same_export(tmp_path):
    with (
        compress.opened(tmp_path / "out", {}, False),
        pytest.raises(ConfigError, match="another process"),
        compress.opened(tmp_path / "out", {}, False),
    ):
        raise AssertionError("both were let in")


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--group=128"], ["inputs", "--group=32"]),
        (["--group=48"], ["48"]),
        (["--method=best"], ["--method=best", "gptq, awq, rtn"]),
        (["--format=fp8"], ["--data", "w4a16"]),
        (["--layout=gguf"], ["--layout=gguf", "compressed-tensors, gptq, awq"]),
        (["--dtype=float32"], ["--dtype", "merged"]),
        (["--method=rtn"], ["--data with --method=rtn"]),
        (["--group=0"], ["--group=0", "-1"]),
        (["--scales=best"], ["--scales", "search"]),
        (["--format=merged"], ["--group", "w4a16"]),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(base, data, tmp_path, flags, words, capsys):
    given = {flag.split("=")[0] for flag in flags}
    first = [f"--model={base}", f"--data={data}", f"--out={tmp_path / 'out'}"]
    usual = [flag for flag in ("--format=w4a16", "--group=32") if flag.split("=")[0] not in given]
    with pytest.raises(SystemExit, match="2"):
        main([*first, *usual, *flags])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_base_alone_names_what_it_needs(base, tmp_path, capsys):
    for flags, word in (
        ([f"--model={base}", "--format=w4a16"], "--out"),
        ([f"--model={base}", "--format=w4a16", "--group=32", f"--out={tmp_path / 'a'}"], "--data"),
        ([f"--model={base}", "--format=peft", f"--out={tmp_path / 'a'}"], "--format=peft"),
        ([f"--model={base}", "--step=3", "--format=merged", f"--out={tmp_path / 'a'}"], "--step"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(flags)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error


def test_a_base_alone_is_merged_as_it_is(base, tmp_path):
    main([f"--model={base}", "--format=merged", f"--out={tmp_path / 'out'}"])
    dense, copy = open_base(base), open_base(str(tmp_path / "out"))
    assert all(np.array_equal(dense.read(name), copy.read(name)) for name in dense.names())
