"""Flags go with the step's compilation; the user's come first, and unknown ones are left out."""

import jax
import pytest

from lljax.hardware import compiler_flags
from lljax.hardware.compiler_flags import FLAGS, Flag, compiler_options
from lljax.parallel.sharding import make_mesh, replicated


def flag(name):
    return Flag(name=name, value=True, platform="cpu", purpose="", source="")


@pytest.fixture
def sharding():
    return replicated(make_mesh(fsdp=8))


@pytest.fixture
def cpu_flag(monkeypatch):
    """A flag that the CPU's compiler has, since that is the compiler here."""
    monkeypatch.setattr(compiler_flags, "FLAGS", (flag("xla_cpu_enable_fast_math"),))


def test_a_flag_is_listed_once_with_its_purpose_and_source():
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    assert all(flag.platform in ("gpu", "tpu") and flag.purpose and flag.source for flag in FLAGS)


def test_a_cpu_is_left_alone(sharding):
    assert compiler_options(sharding) == {}


def test_the_options_reach_the_compiler(sharding, cpu_flag):
    options = compiler_options(sharding)
    assert options == {"xla_cpu_enable_fast_math": True}
    jax.jit(lambda x: x + 1, compiler_options=options)(1)


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_a_flag_of_the_user_is_left_to_the_user(sharding, cpu_flag, monkeypatch, variable):
    monkeypatch.setenv(
        variable, "--xla_cpu_enable_fast_math_too=1 --xla_cpu_enable_fast_math=false"
    )
    assert compiler_options(sharding) == {}
    monkeypatch.setenv(variable, "--xla_cpu_enable_fast_math_too=1")
    assert compiler_options(sharding) != {}


def test_a_flag_that_the_compiler_lacks_is_left_out_with_a_warning(sharding, monkeypatch, caplog):
    monkeypatch.setattr(
        compiler_flags,
        "FLAGS",
        (flag("xla_no_such_flag"), flag("xla_cpu_enable_fast_math")),
    )
    assert compiler_options(sharding) == {"xla_cpu_enable_fast_math": True}
    assert "xla_no_such_flag" in caplog.text
