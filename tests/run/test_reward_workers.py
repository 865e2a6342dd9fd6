"""Reward functions in their processes: whatever one does, the others and the trainer go on."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from lljax.errors import ConfigError
from lljax.run.reward_workers import Judged, Reward, RewardWorkers, weighted

MINE = """
import os, signal, subprocess, sys, time
import beside

TIMES = []

def hang(completions, **columns):
    child = subprocess.Popen(["sleep", "300"])
    print("started", child.pid, file=sys.stderr)
    time.sleep(300)

def spin(completions, **columns):
    while True:
        try:
            time.sleep(300)
        except BaseException:
            pass

def raises(completions, **columns):
    raise ValueError("no\\nmore")

def leave(completions, **columns):
    os._exit(7)

def killed(completions, **columns):
    os.kill(os.getpid(), signal.SIGKILL)

def system_exit(completions, **columns):
    sys.exit(3)

def keyed(completions, **columns):
    return {text: 1.0 for text in completions}


def short(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["1"] * len(completions)

def infinite(completions, **columns):
    return [float("inf")] * len(completions)

def nothing(completions, **columns):
    return None

def prints(completions, **columns):
    print("printed by a reward")
    os.write(1, b"written by a reward")
    assert sys.stdin.read() == ""
    return [1, True, None][: len(completions)]

async def later(completions, answers, weight=1.0):
    return [weight * len(answer) for answer in answers]

def lengths(completion_ids):
    import numpy
    return numpy.array([len(ids) for ids in completion_ids], numpy.float32)

def needs(completions, label, **columns):
    return [float(x == y) for x, y in zip(completions, label)]

def calls(completions, **columns):
    TIMES.append(0)
    return [len(TIMES)] * len(completions)

def process(completions, **columns):
    return [os.getpid()] * len(completions)

def imported(completions, **columns):
    return [float("jax" in sys.modules)] * len(completions)

number = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("")
    return lambda name: f"{tmp_path}/mine.py:{name}"


def judge(workers, **columns):
    columns = {"answers": [["5"], ["7", "8"]]} | columns
    return workers(["p", "p"], ["x 5", "7"], [[1, 1, 1], [2]], columns)


def running(process: str | int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "name,said",
    [
        ("hang", "timed out after 1 seconds"),
        ("spin", "timed out after 1 seconds"),
        ("raises", r"raised ValueError: no\nmore (mine.py, line 20)"),
        ("leave", "its process ended (exit code 7)"),
        ("killed", "its process ended (signal 9)"),
        ("system_exit", "raised SystemExit: 3 (mine.py, line 29)"),
        ("short", "returned 1 values for 2 completions"),
        ("keyed", "returned a dict in place of a list"),
        ("words", "returned a str for completion 0, not a finite number or None"),
        ("infinite", "returned inf for completion 0, not a finite number or None"),
        ("nothing", "raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_a_function_that_fails_is_reported_and_the_others_judge(name, said, mine):
    rewards = [Reward(mine("lengths")), Reward(mine(name)), Reward("contains")]
    with RewardWorkers(rewards, timeout=1) as workers:
        for _ in range(2):  # the second batch too
            since = time.monotonic()
            judged = judge(workers)
            assert judged.names == ("lengths", name, "contains")
            assert judged.failures == {name: said}
            assert judged.values.dtype == np.float32
            np.testing.assert_array_equal(judged.values, [[3, np.nan, 1], [1, np.nan, 0.5]])
            assert time.monotonic() - since < 30


def test_what_a_hanging_function_started_ends_with_it(mine, capfd):
    with RewardWorkers([Reward(mine("hang"))], timeout=0.5) as workers:
        judge(workers)
    child = capfd.readouterr().err.split("started ")[1].strip()
    until = time.monotonic() + 10
    while running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(child)


def test_prints_and_input_stay_away_from_the_trainer(mine, capfd):
    with RewardWorkers([Reward(mine("prints")), Reward("contains")], timeout=20) as workers:
        judged = judge(workers)
    assert not judged.failures and judged.values.tolist() == [[1, 1], [1, 0.5]]
    printed = capfd.readouterr()
    assert printed.out == "" and "printed by a reward" in printed.err


def test_async_functions_options_and_names(mine):
    rewards = [
        Reward(mine("later")),
        Reward(mine("later"), options=(("weight", 0.5),)),
        Reward("repetition", options=(("ngram_size", 1), ("max_penalty", -3.0))),
        Reward("exact"),
    ]
    with RewardWorkers(rewards, timeout=20, processes=3) as workers:
        judged = judge(workers, other=["a", "b"])
    assert judged.names == ("later", "later_2", "repetition", "exact") and not judged.failures
    assert judged.values.tolist() == [[1, 0.5, -2, 0], [2, 1, 0, 1]]


def test_tokens_of_any_array_type_arrive_as_integers_without_jax(mine):
    ids = [np.arange(4, dtype=np.uint32), jnp.array([5, 5, 5, 5])]
    rewards = [Reward("repetition"), Reward(mine("lengths")), Reward(mine("imported"))]
    with RewardWorkers(rewards, timeout=20) as workers:
        judged = workers([""] * 2, [""] * 2, ids, {})
    assert judged.values.tolist() == [[0, 4, 0], [-0.5, 4, 0]]


def test_a_batch_of_many_megabytes_arrives(mine):
    texts = ["x" * (1 << 22) + end for end in "ab"]
    with RewardWorkers([Reward("contains")], timeout=60) as workers:
        judged = workers(texts, texts, [[1]] * 2, {"answers": [["xa"], ["xa"]]})
    assert judged.values.tolist() == [[1], [0]]


def test_a_module_is_found_by_name_and_the_functions_keep_state(mine, tmp_path, monkeypatch):
    mine("calls")
    monkeypatch.chdir(tmp_path)  # not on sys.path: the command `lljax` is somewhere else
    with RewardWorkers([Reward("mine:calls")], timeout=20) as workers:
        assert [judge(workers).values[0, 0] for _ in range(3)] == [1, 2, 3]


def test_a_process_killed_between_batches_is_replaced(mine):
    with RewardWorkers([Reward(mine("process"))], timeout=20) as workers:
        first = workers._all[0]._child.popen.pid
        os.kill(first, signal.SIGKILL)
        time.sleep(0.2)
        judged = judge(workers)
        assert not judged.failures and workers._all[0]._child.popen.pid != first


def test_processes_judge_at_the_same_time_and_end_with_the_context(mine):
    rewards = [Reward(mine("hang")), Reward(mine("spin")), Reward("contains")]
    with RewardWorkers(rewards, timeout=2, processes=2) as workers:
        since = time.monotonic()
        assert set(judge(workers).failures) == {"hang", "spin"}
        assert time.monotonic() - since < 3.5
        judge(workers)
        children = [worker._child.popen for worker in workers._all if worker._child]
    assert children and all(child.returncode is not None for child in children)


def test_the_built_in_rewards_need_no_jax(mine):
    with RewardWorkers([Reward("rouge"), Reward(mine("imported"))], timeout=20) as workers:
        assert judge(workers).values[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize(
    "function,options,said",
    [
        ("exakt", {}, "reward exakt: there is no reward of this name: exact, contains, "),
        ("no_such_module:f", {}, "importing it raised ModuleNotFoundError: No module named"),
        ("/no/such.py:f", {}, "reward /no/such.py:f: there is no such file"),
        ("json:no_such", {}, "reward json:no_such: the module has no 'no_such'"),
        ("mine:number", {}, "'number' is a int, not a function"),
        ("repetition", {"n": 2}, "it has no option 'n': ngram_size, max_penalty"),
        ("repetition", {"ngram_size": 0}, "reward repetition: option ngram_size=0"),
        ("repetition", {"ngram_size": "two"}, "reward repetition: .*'str'"),
        ("overlong", {"max_tokens": 9}, "reward overlong: it needs the options cache$"),
        ("mine:later", {"wait": 2}, "it has no option 'wait': answers, weight"),
        ("mine:lengths", {"wait": 2}, "it has no option 'wait': it has none"),
        ("mine:calls", {"prompts": 2}, "it has no option 'prompts'"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_before_training(function, options, said, mine):
    function = mine(function[5:]) if function.startswith("mine:") else function
    rewards = [Reward("exact"), Reward(function, options=tuple(options.items()))]
    with pytest.raises(ConfigError, match=said) as raised:
        RewardWorkers(rewards, timeout=20)
    assert "\n" not in str(raised.value)


def test_a_column_that_is_missing_is_named(mine):
    with RewardWorkers([Reward("exact")], timeout=20) as workers:
        with pytest.raises(ConfigError, match="^reward exact needs the column answers or answer "):
            workers(["p"], ["c"], [[1]], {"pattern": ["a"]})
        workers.require(["solution"])
    with RewardWorkers([Reward(mine("needs"))], timeout=20) as workers:
        with pytest.raises(ConfigError, match="needs the column label in every .* have answers$"):
            judge(workers)
        assert judge(workers, label=["x 5", ""]).values.tolist() == [[1], [0]]
    rewards = [Reward(mine("later"), options=(("weight", 2),))]
    with (
        RewardWorkers(rewards, timeout=20) as workers,
        pytest.raises(ConfigError, match="weight is an option and a column"),
    ):
        judge(workers, weight=[1, 1])


def test_an_interrupted_batch_is_not_taken_for_the_next(mine):
    rewards = [Reward(mine("spin")), Reward(mine("lengths"))]
    with RewardWorkers(rewards, timeout=30) as workers:
        main = threading.main_thread().ident
        threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)).start()
        since = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            judge(workers)
        assert time.monotonic() - since < 20
        workers.timeout = 1
        judged = judge(workers)
        assert set(judged.failures) == {"spin"} and judged.values[:, 1].tolist() == [3, 1]


@pytest.mark.parametrize("name,margin", [("lengths", 0), ("spin", 5)])
def test_the_processes_end_when_the_trainer_is_killed(name, margin, mine):
    """Idle: with their input. In a function that hangs: by their own timer."""
    code = f"""
import threading, time
from lljax.run.reward_workers import Reward, RewardWorkers

workers = RewardWorkers([Reward({mine(name)!r})], timeout=2)
threading.Thread(target=workers, args=([""], [""], [[1]], {{}}), daemon=True).start()
time.sleep(0.5)
print(workers._all[0]._child.popen.pid, flush=True)
time.sleep(300)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment
    ) as started:
        child = int(started.stdout.readline())
        started.kill()
    until = time.monotonic() + 10 + margin
    while running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running(child)


def test_the_weighted_sum_leaves_out_none_and_is_none_without_any():
    nan = np.nan
    values = np.array([[1, 2], [nan, 2], [1, nan], [nan, nan]], np.float32)
    total = weighted(Judged(values, ("a", "b")), [0.5, -1])
    np.testing.assert_array_equal(total, np.array([-1.5, -2, 0.5, nan], np.float32))
    assert total.dtype == np.float32
