"""A process that answers requests over pipes."""

import sys
import time

import pytest

from lljax.data.child import Child, ChildEnded

ECHO = """
import sys, time
while header := sys.stdin.buffer.read(8):
    request = sys.stdin.buffer.read(int.from_bytes(header))
    if request == b"hang":
        time.sleep(300)
    if request == b"leave":
        sys.exit(5)
    if request == b"cut":
        sys.stdout.buffer.write((9).to_bytes(8) + b"short")
        sys.stdout.flush()
        sys.exit(6)
    sys.stdout.buffer.write(header + request)
    sys.stdout.flush()
"""


@pytest.fixture
def child():
    child = Child([sys.executable, "-c", ECHO])
    yield child
    child.stop()


def test_requests_and_answers_of_any_size(child):
    for size in (0, 1, 1 << 16, 5_000_001):
        assert child.ask(b"x" * size, 60) == b"x" * size and child.idle()


def test_no_answer_in_time(child):
    since = time.monotonic()
    with pytest.raises(TimeoutError):
        child.ask(b"hang", 0.5)
    assert time.monotonic() - since < 10 and child.stop() == -9 and child.stop() == -9


def test_a_request_that_nobody_reads_is_given_up():
    child = Child([sys.executable, "-c", "import time; time.sleep(300)"])
    with pytest.raises(TimeoutError):
        child.ask(b"x" * (1 << 22), 0.5)
    child.stop()


@pytest.mark.parametrize("request_,code", [(b"leave", 5), (b"cut", 6)])
def test_a_process_that_ends_instead_of_answering(request_, code, child):
    with pytest.raises(ChildEnded) as ended:
        child.ask(request_, 60)
    assert ended.value.code in (code, -9)  # killed while it was ending


def test_a_process_that_was_killed_is_not_idle(child):
    assert child.ask(b"a", 60) == b"a" and child.idle()
    child.kill()
    child.popen.wait()
    assert not child.idle()
    with pytest.raises(ChildEnded):
        child.ask(b"a", 60)
