"""The devices that a program can be compiled for without having them: kind and number."""

import dataclasses
import re
from typing import Any

from jax.experimental import topologies

from lljax.errors import ConfigError, first_line
from lljax.hardware.chips import DEVICES, Device


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` devices of one kind; `name` as the user wrote it."""

    name: str
    device: Device
    count: int

    def devices(self) -> list:
        """Device descriptions that a program can be compiled for, without any such device here.

        Raises:
          ConfigError: the compiler of the platform is not installed.
        """
        try:
            return list(_topology(self).devices)
        except Exception as error:  # a missing plugin is reported as many kinds of exception
            extra = "plan-tpu" if self.device.platform == "tpu" else "plan-gpu"
            raise ConfigError(
                f"--device={self.name}: no compiler for it here ({first_line(error)[:160]}): "
                f"pip install 'lljax[{extra}]'"
            ) from None


def target(name: str) -> Target:
    """The devices named h100-80g, h100-80g:8, v5e-8, v5p-128 (cores) ...

    Raises:
      ConfigError: there is no such device or slice; names the legal ones.
    """
    match = re.fullmatch(r"(v\d+[ep])-(\d+)|([a-z0-9-]+?)(?::(\d+))?", name)
    kind, number = (match[1] or match[3], match[2] or match[4]) if match else ("", None)
    if kind not in DEVICES:
        raise ConfigError(
            f"--device={name}: there are {', '.join(DEVICES)}; several GPUs are named such as "
            "h100-80g:8, and a TPU slice such as v5e-8"
        )
    device, count = DEVICES[kind], int(number or 1)
    if device.slices:
        count, rest = divmod(count, device.slices.cores)
        if rest or count not in device.slices.shapes:
            names = ", ".join(sized(device, chips).name for chips in device.slices.shapes)
            raise ConfigError(f"--device={name}: there is no such slice; there are {names}")
    return Target(name, device, count)


def counts(device: Device) -> tuple[int, ...]:
    """The numbers of devices of a kind that can be rented together, ascending."""
    return tuple(device.slices.shapes) if device.slices else (1, 2, 4, 8, 16, 32, 64)


def sized(device: Device, count: int) -> Target:
    """`count` devices of a kind, by the name that `target` reads."""
    if device.slices:
        return Target(f"{device.name}-{count * device.slices.cores}", device, count)
    return Target(f"{device.name}:{count}", device, count)


def _topology(target: Target) -> Any:
    device = target.device
    if device.slices:
        shape = device.slices.shapes[target.count]
        # The compiler describes whole hosts of four chips or more; a single chip is a host cut down
        # to one.
        options = {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1} if target.count == 1 else {}
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{device.name}:{shape}", **options
        )
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=device.kinds[0],  # kernels look up the architecture by this name
        target_config=_gpu_config(device),
        topology=f"1x1x{target.count}",
    )


def _gpu_config(device: Device) -> str:
    """A GpuTargetConfigProto in text form (xla/stream_executor/device_description.proto)."""
    gpu = device.gpu
    assert gpu, "a device without slices is a GPU"
    major, minor = gpu.capability
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {gpu.shared_memory} threads_per_core_limit: 2048
        core_count: {gpu.multiprocessors} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {gpu.l2} clock_rate_ghz: 1.7
        device_memory_size: {device.memory}
        shared_memory_per_block_optin: {gpu.shared_memory - 1024}
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      runtime_version {{ major: 13 minor: 0 patch: 0 }}
      device_description_str: "{device.kinds[0]}" """
