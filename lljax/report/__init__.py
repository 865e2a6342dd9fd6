"""The report of a run as one HTML page: `write_report(workdir)`."""

from lljax.report.page import write_page, write_report
from lljax.report.records import read_metrics

__all__ = ["read_metrics", "write_page", "write_report"]
