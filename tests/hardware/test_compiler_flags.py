"""The flags go with the step's compilation, the user's own come first, and a compiler without one
goes without it.
"""

import jax
import pytest

from lljax.hardware import compiler_flags
from lljax.hardware.compiler_flags import FLAGS, Flag, compiler_options
from lljax.parallel.sharding import make_mesh, replicated


@pytest.fixture
def where():
    return replicated(make_mesh(fsdp=8))


@pytest.fixture
def cpu_flag(monkeypatch):
    """A flag that the CPU's compiler has, since that is the compiler here."""
    monkeypatch.setattr(
        compiler_flags, "FLAGS", (Flag("xla_cpu_enable_fast_math", True, "cpu", "", ""),)
    )


def test_a_flag_is_told_once_with_its_purpose_and_source():
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    assert all(flag.platform in ("gpu", "tpu") and flag.purpose and flag.source for flag in FLAGS)


def test_a_cpu_is_left_alone(where):
    assert compiler_options(where) == {}


def test_the_options_reach_the_compiler(where, cpu_flag):
    options = compiler_options(where)
    assert options == {"xla_cpu_enable_fast_math": True}
    jax.jit(lambda x: x + 1, compiler_options=options)(1)


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_what_the_user_set_stays(where, cpu_flag, monkeypatch, variable):
    monkeypatch.setenv(
        variable, "--xla_cpu_enable_fast_math_too=1 --xla_cpu_enable_fast_math=false"
    )
    assert compiler_options(where) == {}
    monkeypatch.setenv(variable, "--xla_cpu_enable_fast_math_too=1")
    assert compiler_options(where) != {}


def test_a_flag_that_the_compiler_lost_is_left_out_with_a_warning(where, monkeypatch, caplog):
    monkeypatch.setattr(
        compiler_flags,
        "FLAGS",
        (
            Flag("xla_no_such_flag", 1, "cpu", "", ""),
            Flag("xla_cpu_enable_fast_math", True, "cpu", "", ""),
        ),
    )
    assert compiler_options(where) == {"xla_cpu_enable_fast_math": True}
    assert "xla_no_such_flag" in caplog.text
