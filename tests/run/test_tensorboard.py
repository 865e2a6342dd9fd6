"""TensorBoard shows every step once, whatever happened in between, and never stops a run."""

import struct
import time

import pytest
from run.cases import run_info
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lljax.run.tensorboard import TensorBoard


def run(workdir, steps, *, start=0, evaluations=(), board=None):
    board = board or TensorBoard()
    board.open(run_info(workdir, step=start))
    for step in steps:
        if step == "back":
            board.rollback(7)
            continue
        board.step({"step": step, "loss": 3.0 + 1 / step, "spike": False, "attention": "full"})
        if step in evaluations:
            board.evaluation(step, {"loss@512": 2.0 + 1 / step})
    board.close(None)


def test_tensorboard_shows_each_step_once_after_a_resume_and_a_rollback(tmp_path, monkeypatch):
    run(tmp_path, range(1, 9), evaluations=(4, 8))
    # an events file is named by its second
    clock = time.time() + 1
    monkeypatch.setattr(time, "time", lambda: clock)
    run(tmp_path, (7, 8, 9, "back", 8, 9, 10), start=6, evaluations=(8,))
    shown = {}
    for file in sorted(
        (tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
    ):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its crc, the event, its crc
            size = struct.unpack_from("<Q", data, at)[0]
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:  # TensorBoard purges
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in shown
                shown[value.tag, event.step] = value.simple_value
    assert [step for tag, step in shown if tag == "train/loss"] == list(range(1, 11))
    assert [step for tag, step in shown if tag.startswith("eval/loss")] == [4, 8]
    assert shown["train/loss", 4] == pytest.approx(3.25)


class FullDisk(RecordWriter):
    def write(self, data):
        raise OSError(28, "No space left on device")


def test_without_room_there_is_one_warning(tmp_path, caplog):
    run(tmp_path, range(1, 4), board=TensorBoard(open_file=FullDisk))
    assert caplog.text.count("No space left") == 1


def test_tags_have_no_characters_that_tensorboard_refuses(tmp_path):
    run(tmp_path, (1,), evaluations=(1,))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert file.name.startswith("events.out.tfevents.")
    for tag in (b"train/loss", b"train/spike", b"eval/loss_512"):
        assert tag in content
    assert b"train/step" not in content and b"train/attention" not in content


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    run(tmp_path, range(1, 5), evaluations=(4,))
    assert not (tmp_path / "tensorboard").exists()
