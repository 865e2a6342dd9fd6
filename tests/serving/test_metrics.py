"""The text that Prometheus reads."""

import re

from lljax.generation.completion import Piece
from lljax.generation.engine import Counts
from lljax.serving.metrics import Metrics

LINE = re.compile(r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\})? -?[0-9.e+]+')


class Engine:
    def counts(self):
        return Counts(waiting=1, reading=2, writing=3, read=9, reused=4, written=8, kept=5)


def test_every_line_is_a_sample_or_its_description():
    metrics = Metrics()
    metrics.requests["/v1/completions", 200] += 2
    metrics.prompt_tokens["base"] += 10
    metrics.heard(Piece(1, "a"))
    metrics.heard(Piece(None, "", None, "stop"))
    metrics.whole.add(1.5)
    text = metrics.text([Engine(), Engine()], slots=8, queue=64)
    for line in text.splitlines():
        assert line.startswith(("# HELP lljax_", "# TYPE lljax_")) or LINE.fullmatch(line), line
    for sample in (
        'lljax_requests_total{endpoint="/v1/completions",status="200"} 2',
        'lljax_completions_total{reason="stop"} 1',
        "lljax_generated_tokens_total 1",
        "lljax_tokens_per_second 0.1",
        "lljax_requests_waiting 2",
        "lljax_slots 16",
        "lljax_slots_busy 10",
        "lljax_prefix_cache_hits_total 8",
        "lljax_request_seconds_sum 1.500000",
    ):
        assert sample in text.splitlines()
