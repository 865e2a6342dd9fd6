"""Imported before jax by measurements that only compile: for TPU and GPU, without either."""

from lljax.cli.process import compile_without_devices

compile_without_devices()
