"""The chips that a run can be planned for and measured against, with figures of their data sheets.

README.md beside this file says how to add one.
"""

import dataclasses
from collections.abc import Mapping

GB, MiB, GiB = 10**9, 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as its compiler needs to know it.

    capability: major and minor. shared_memory: bytes of a multiprocessor. multiprocessors: their
      number. l2: bytes of the cache.
    """

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int
    l2: int


@dataclasses.dataclass(frozen=True)
class Slices:
    """The slices that a TPU is rented in.

    shapes: number of chips -> topology. cores: of a chip, if a slice is named by its number of
      cores (v5p-8 has four chips); otherwise 1.
    """

    shapes: Mapping[int, str] = dataclasses.field(hash=False)
    cores: int = 1


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip.

    memory: bytes that a program can use. flops: dense bfloat16 operations a second. bandwidth:
      bytes a second of its memory. link: bytes a second to its neighbors, one way. host: bytes of
      host memory per device of a typical node.
    kinds: the names that JAX has for it (`device.device_kind`), only if their peak is `flops`: an
      H100 PCIe or an A10G is slower. A program for an absent GPU is compiled for the first of them.
    """

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    host: int
    kinds: tuple[str, ...]
    gpu: Gpu | None = None
    slices: Slices | None = None

    @property
    def fp8(self) -> bool:
        """Whether it multiplies in 8 bits faster than in 16."""
        return self.gpu is not None and self.gpu.capability >= (8, 9)


# fmt: off
_PLANE = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}
_CUBE = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8",
}
_ROWS = (
    Device(name="h100-80g", platform="cuda", kinds=("NVIDIA H100 80GB HBM3",), memory=79 * GiB,
           flops=989e12, bandwidth=3.35e12, link=450e9, host=240 * GB,
           gpu=Gpu(capability=(9, 0), shared_memory=233_472, multiprocessors=132, l2=50 * MiB)),
    Device(name="h200", platform="cuda", kinds=("NVIDIA H200",), memory=140 * GiB,
           flops=989e12, bandwidth=4.8e12, link=450e9, host=240 * GB,
           gpu=Gpu(capability=(9, 0), shared_memory=233_472, multiprocessors=132, l2=50 * MiB)),
    Device(name="b200", platform="cuda", kinds=("NVIDIA B200",), memory=178 * GiB,
           flops=2_250e12, bandwidth=8.0e12, link=900e9, host=240 * GB,
           gpu=Gpu(capability=(10, 0), shared_memory=233_472, multiprocessors=148, l2=126 * MiB)),
    Device(name="a100-80g", platform="cuda",
           kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), memory=79 * GiB,
           flops=312e12, bandwidth=2.04e12, link=300e9, host=128 * GB,
           gpu=Gpu(capability=(8, 0), shared_memory=167_936, multiprocessors=108, l2=40 * MiB)),
    Device(name="a10-24g", platform="cuda", kinds=("NVIDIA A10",), memory=22 * GiB,
           flops=125e12, bandwidth=0.6e12, link=32e9, host=120 * GB,
           gpu=Gpu(capability=(8, 6), shared_memory=102_400, multiprocessors=72, l2=6 * MiB)),
    Device(name="l4", platform="cuda", kinds=("NVIDIA L4",), memory=22 * GiB,
           flops=121e12, bandwidth=0.3e12, link=32e9, host=48 * GB,
           gpu=Gpu(capability=(8, 9), shared_memory=102_400, multiprocessors=58, l2=48 * MiB)),
    Device(name="rtx4090", platform="cuda", kinds=("NVIDIA GeForce RTX 4090",),
           memory=int(23.5 * GiB), flops=165e12, bandwidth=1.01e12, link=32e9, host=64 * GB,
           gpu=Gpu(capability=(8, 9), shared_memory=102_400, multiprocessors=128, l2=72 * MiB)),
    Device(name="rtx4080-16g", platform="cuda", kinds=("NVIDIA GeForce RTX 4080",),
           memory=int(15.5 * GiB), flops=97e12, bandwidth=0.717e12, link=32e9, host=64 * GB,
           gpu=Gpu(capability=(8, 9), shared_memory=102_400, multiprocessors=76, l2=64 * MiB)),
    Device(name="rtx4060-8g", platform="cuda", kinds=("NVIDIA GeForce RTX 4060",),
           memory=int(7.6 * GiB), flops=30e12, bandwidth=0.272e12, link=16e9, host=32 * GB,
           gpu=Gpu(capability=(8, 9), shared_memory=102_400, multiprocessors=24, l2=24 * MiB)),
    Device(name="v5e", platform="tpu", kinds=("TPU v5 lite", "TPU v5e"), memory=int(15.75 * GiB),
           flops=197e12, bandwidth=0.82e12, link=200e9, host=48 * GB, slices=Slices(_PLANE)),
    Device(name="v5p", platform="tpu", kinds=("TPU v5", "TPU v5p"), memory=int(95.74 * GiB),
           flops=459e12, bandwidth=2.77e12, link=600e9, host=112 * GB,
           slices=Slices(_CUBE, cores=2)),
    Device(name="v6e", platform="tpu", kinds=("TPU v6 lite", "TPU v6e"), memory=int(31.25 * GiB),
           flops=918e12, bandwidth=1.64e12, link=448e9, host=180 * GB, slices=Slices(_PLANE)),
)
# fmt: on
DEVICES = {device.name: device for device in _ROWS}


def of_kind(device_kind: str) -> Device | None:
    """The device that JAX has this name for; None if its figures are not known."""
    return next((device for device in DEVICES.values() if device_kind in device.kinds), None)
