"""`lljax report`: writes the page, or says in one line why it cannot."""

import pytest

from lljax.cli.report import main


@pytest.fixture
def workdir(tmp_path, run_config):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(run_config.to_json())
    return tmp_path / "run"


def test_the_report_is_written_and_its_path_printed(workdir, capsys):
    main([f"--workdir={workdir}"])
    assert capsys.readouterr().out == f"{workdir / 'report.html'}\n"
    assert (workdir / "report.html").read_text().startswith("<!doctype html>")


def test_a_report_that_cannot_be_written_is_one_line(workdir, tmp_path, capsys):
    (workdir / "report.html").mkdir()
    for folder, message in (
        (tmp_path, "no run was started there"),
        (workdir, "report.html cannot be written"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([f"--workdir={folder}"])
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
