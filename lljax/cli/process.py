"""Set-up of a process before jax and other slow libraries are imported."""

import contextlib
import os
import signal


def leave_on_signals() -> None:
    """Ends the process with exit code 75 on SIGTERM, SIGINT and SIGHUP.

    Covers the seconds before training handles signals itself (imports, loading) and those after.
    Also opens stdin, stdout and stderr on /dev/null if they are closed, so that log lines cannot
    end up in the next file that is opened.
    """
    with contextlib.suppress(OSError):
        while (opened := os.open(os.devnull, os.O_RDWR)) < 3:  # takes the lowest free number
            pass
        os.close(opened)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup ignores SIGHUP
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, _) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed
        name = signal.Signals(number).name
        os.write(
            2,
            f"Stopped: {name} before the first step or after the last: nothing to save\n".encode(),
        )
    os._exit(75)  # an exception might be caught by the code that it interrupts


def compile_without_devices() -> None:
    """Sets the environment in which the compilers of TPU and GPU run quietly without a device."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
