"""The report is written on time, after the evaluation of its step, and never ends a run."""

from run.cases import run_info

from lljax.config import default_config
from lljax.run.report_writer import ReportWriter


def opened(workdir, every):
    config = default_config()
    config.training.report_every = every
    writer = ReportWriter()
    writer.open(run_info(workdir, config=config))
    return writer


def test_it_is_written_before_the_step_after_its_own_and_at_the_end(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    writer, report = opened(tmp_path, every=2), tmp_path / "report.html"
    assert writer.every == 2
    writer.begin(1)
    writer.step({"step": 2})
    assert not report.exists()  # the evaluation of step 2 may come
    writer.begin(3)
    assert report.exists()
    report.unlink()
    writer.begin(4)
    writer.close(KeyboardInterrupt())
    assert not report.exists()
    opened(tmp_path, every=0).close(None)
    assert report.exists()


def test_a_report_that_fails_is_a_warning(tmp_path, caplog):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "report.html").mkdir()
    opened(tmp_path, every=0).close(None)
    assert "the report could not be written (IsADirectoryError" in caplog.text
