"""Several processes in one run: they join, agree, take turns, and end when one of them is lost.

Two private modules of jax are imported: `jax._src.distributed`, whose client has barriers that
outlast a slow peer, and `jax._src.clusters`, the launchers that jax detects. jax has no public
counterpart of either.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as coordination
from jax._src.clusters import ClusterEnv, K8sCluster
from jax.experimental import multihost_utils

from lljax.errors import ConfigError, PeerLost, first_line

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS = 300  # time for all processes to come up
LEAVE_SECONDS = 10  # time for the others to reach the same end, as they do when all stop
TURN_SECONDS = 86_400  # one process may prepare the documents for all, for hours
COLLECTIVE_FAILED = re.compile(
    r"gloo|nccl|coordination service|heartbeat|connection (closed|reset)", re.IGNORECASE
)
SAME_COMMAND = "start the same command again in all of them, it goes on from the last checkpoint"


# ---------------------------------------------------------------- beginning and end
def start(peer_timeout: float) -> None:
    """Joins the other processes of the run, before the first use of a device; does nothing without
    any.

    The variables of `ENVIRONMENT` come first (jax itself reads only the address), then the
    launchers that jax detects: Cloud TPU, SLURM, Open MPI, Kubernetes.

    peer_timeout: seconds without a heartbeat after which a process counts as lost, and the others
      end.

    Raises:
      ConfigError: the environment names a run of several processes, but not how to join it.
    """
    if any(name in os.environ for name in ENVIRONMENT[1:]):
        (address, count, index), detect = _from_environment(), "deactivate"
    else:
        address, count, index, detect = None, _detected(), None, None
    if count == 1:
        return
    _end_on_abort()
    # it would handle SIGTERM, which lljax.run.signals does
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        count,
        index,
        cluster_detection_method=detect,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=int(peer_timeout),
        shutdown_timeout_seconds=int(peer_timeout),
    )


def _from_environment() -> tuple[str | None, int, int | None]:
    """(address, number of processes, index) from the environment variables."""
    given = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    try:
        count = int(given.get("JAX_NUM_PROCESSES", ""))
        if count == 1:
            return None, 1, None
        address, _, port = given["JAX_COORDINATOR_ADDRESS"].rpartition(":")
        index = int(given["JAX_PROCESS_ID"])
        if not address or not port.isdigit() or not 0 <= index < count:
            raise ValueError
        return given["JAX_COORDINATOR_ADDRESS"], count, index
    except (KeyError, ValueError):
        shown = " ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(
            f"{shown} do not suffice to join: set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0), or none of them to run alone"
        ) from None


def _detected() -> int:
    """The number of processes that a launcher known to jax has started."""
    for cluster in ClusterEnv._cluster_types:
        # To count the pods of a job jax asks the Kubernetes API, which a pod that belongs to none
        # may not do.
        if (
            cluster.opt_in_only_method
            or cluster is K8sCluster
            and "JOB_COMPLETION_INDEX" not in os.environ
        ):
            continue
        try:
            if cluster.is_env_present():
                return cluster.get_process_count()
        except Exception as error:  # raised by whatever library reads the environment
            raise ConfigError(
                f"jax takes this for a {cluster.__name__} and cannot read it "
                f"({first_line(error)}): set {', '.join(ENVIRONMENT)}, or JAX_NUM_PROCESSES=1 to "
                "run alone"
            ) from None
    # Open MPI 5, whose address jax does not find
    if (count := int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))) > 1:
        raise ConfigError(
            f"mpirun has started {count} processes and this jax does not find the first: pass it "
            f"{', '.join(ENVIRONMENT)} (JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK)"
        )
    return 1


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Context of the `main` of a script that calls `start`: a process that fails does not keep the
    others waiting.

    By itself jax would wait for the others at exit, and they for it in the next collective.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            _leave(error)
        raise


@contextlib.contextmanager
def to_the_end() -> Iterator[None]:
    """Context of a whole script: the process ends with it, whatever its other threads wait for.

    Threads of Orbax wait up to five minutes for a save that has failed, and Python for them.
    """
    global _script
    code, _script = 0, True
    try:
        yield
    except SystemExit as error:
        code = 0 if error.code is None else error.code
    except BaseException as error:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        code = 1
    if not isinstance(code, int):  # a text, which Python prints
        with contextlib.suppress(OSError):
            print(code, file=sys.stderr)
        code = 1
    if jax.distributed.is_initialized():  # which jax does at exit
        jax.distributed.shutdown()
    _exit(code)


def is_script() -> bool:
    """Whether the process runs a script of lljax and nothing else, so that any thread may end
    it.
    """
    return _script


_script = False


def _leave(error: BaseException) -> None:
    if isinstance(error, SystemExit):  # said already
        code = error.code if isinstance(error.code, int) else 1
    elif COLLECTIVE_FAILED.search(str(error)):
        _lost(f"({first_line(error)})")
    else:
        traceback.print_exception(error)
        code = 1
    _end_on_abort(code)
    with contextlib.suppress(Exception):  # they may have no reason to end
        _client().wait_at_barrier("leave", 1000 * LEAVE_SECONDS)
    _exit(code)


def _lost(reason: str) -> NoReturn:
    state = coordination.global_state
    error = PeerLost(
        f"process {state.process_id} of {state.num_processes} ends because another has ended or "
        f"does not answer {reason}: see the log of that one, then {SAME_COMMAND}"
    )
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    _exit(error.exit_code)


def _exit(code: int) -> NoReturn:
    """Ends without exit handlers: in them jax and Orbax would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _end_on_abort(code: int | None = None) -> None:
    """Replaces jax's abort by one line and an exit code, or by `code` alone.

    jax logs and aborts, from a thread of its own, when a process is lost or does not join in time.
    A Python signal handler would not run any more, nor does jax take a callback from Python (its
    argument has no conversion, jaxlib 0.10 to 0.12), so the handler is a C callback.
    """
    global _handler  # C holds no reference to it

    def handler(_):
        if code is None:
            _lost("(the lines above)")
        _exit(code)

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))


# ---------------------------------------------------------------- agreement and turns
def is_first() -> bool:
    """Whether this is process 0, which writes the files that are written once."""
    return jax.process_index() == 0


def from_all(value) -> list:
    """Gathers a JSON value of every process, in their order; every process must call this."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    padded = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - len(text))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(padded, lengths, strict=True)]


@functools.lru_cache
def processes_on_host() -> int:
    """The number of processes of the run on this host. Every process must call this, even before
    jax has started.
    """
    client = coordination.global_state.client
    if client is None:
        return 1
    client.key_value_set(
        f"lljax-hosts/{coordination.global_state.process_id}", socket.gethostname()
    )
    client.wait_at_barrier("lljax-hosts", 1000 * JOIN_SECONDS)
    return [name for _, name in client.key_value_dir_get("lljax-hosts")].count(socket.gethostname())


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process; every process must call this. One small collective."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def first_then_others(work: Callable[[], Any]) -> Any:
    """`work()` in process 0, then in the others, which find its files on a shared file system."""
    if not is_first():
        barrier()
    result = work()
    if is_first():
        barrier()
    return result


def barrier() -> None:
    """Waits until every process calls it. Not a collective: on CPUs that gives up after 30
    seconds.
    """
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"lljax-{next(_turns)}", 1000 * TURN_SECONDS)


_turns = itertools.count()


def _client():
    """The client of the coordination service, of a process that has joined."""
    client = coordination.global_state.client
    assert client is not None, "this process has not joined others"
    return client
