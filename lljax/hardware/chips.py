"""Chips that a run can be planned for and measured against: figures from the makers' data
sheets.
"""

import dataclasses

GB, GiB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip. memory: bytes that a program can use. flops: dense bfloat16 products a second.
    bandwidth: bytes a second of its memory. link: bytes a second to its neighbours, one way. host:
    bytes of host memory that go with one device of a typical node. sm: compute capability, shared
    memory and multiprocessors of a GPU.
    """

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    host: int
    sm: tuple = ()

    @property
    def fp8(self) -> bool:
        """Whether it multiplies in eight bits faster than in sixteen."""
        return self.sm[:2] >= (8, 9)


DEVICES = {
    device.name: device
    for device in (
        Device(
            "h100-80g",
            "cuda",
            79 * GiB,
            989e12,
            3.35e12,
            450e9,
            240 * GB,
            (9, 0, 233_472, 132, 50 * 2**20),
        ),
        Device(
            "h200",
            "cuda",
            140 * GiB,
            989e12,
            4.8e12,
            450e9,
            240 * GB,
            (9, 0, 233_472, 132, 50 * 2**20),
        ),
        Device(
            "b200",
            "cuda",
            178 * GiB,
            2_250e12,
            8.0e12,
            900e9,
            240 * GB,
            (10, 0, 233_472, 148, 126 * 2**20),
        ),
        Device(
            "a100-80g",
            "cuda",
            79 * GiB,
            312e12,
            2.04e12,
            300e9,
            128 * GB,
            (8, 0, 167_936, 108, 40 * 2**20),
        ),
        Device(
            "a10-24g",
            "cuda",
            int(22.0 * GiB),
            125e12,
            0.6e12,
            32e9,
            120 * GB,
            (8, 6, 102_400, 72, 6 * 2**20),
        ),
        Device(
            "l4",
            "cuda",
            int(22.0 * GiB),
            121e12,
            0.3e12,
            32e9,
            48 * GB,
            (8, 9, 102_400, 58, 48 * 2**20),
        ),
        Device(
            "rtx4090",
            "cuda",
            int(23.5 * GiB),
            165e12,
            1.01e12,
            32e9,
            64 * GB,
            (8, 9, 102_400, 128, 72 * 2**20),
        ),
        Device(
            "rtx4080-16g",
            "cuda",
            int(15.5 * GiB),
            97e12,
            0.717e12,
            32e9,
            64 * GB,
            (8, 9, 102_400, 76, 64 * 2**20),
        ),
        Device(
            "rtx4060-8g",
            "cuda",
            int(7.6 * GiB),
            30e12,
            0.272e12,
            16e9,
            32 * GB,
            (8, 9, 102_400, 24, 24 * 2**20),
        ),
        Device("v5e", "tpu", int(15.75 * GiB), 197e12, 0.82e12, 200e9, 48 * GB),
        Device("v5p", "tpu", int(95.74 * GiB), 459e12, 2.77e12, 600e9, 112 * GB),
        Device("v6e", "tpu", int(31.25 * GiB), 918e12, 1.64e12, 448e9, 180 * GB),
    )
}

# What JAX calls them (`device.device_kind`): only names whose peak is the one above; an H100 PCIe
# or an A10G is slower.
KINDS = {
    "NVIDIA H100 80GB HBM3": "h100-80g",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100 80GB PCIe": "a100-80g",
    "NVIDIA A10": "a10-24g",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 4080": "rtx4080-16g",
    "NVIDIA GeForce RTX 4060": "rtx4060-8g",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def of_kind(device_kind: str) -> Device | None:
    """The device that JAX names so; None where its figures are not known."""
    return DEVICES.get(KINDS.get(device_kind))
