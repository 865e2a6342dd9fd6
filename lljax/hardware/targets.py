"""The devices that a run can be planned for, as the compilers name them."""

import dataclasses
import re

from jax.experimental import topologies

from lljax.errors import ConfigError
from lljax.hardware.chips import DEVICES, KINDS, Device

# Chips of a TPU slice -> its shape. A v5p slice is named by its cores, two a chip.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """`count` devices of one kind; `name` as the user wrote it."""

    name: str
    device: Device
    count: int

    def devices(self) -> list:
        """Device descriptions that a program can be compiled for, where there are none.

        Raises:
          ConfigError: the compiler of the platform is not installed.
        """
        try:
            return list(_topology(self).devices)
        except Exception as error:  # a missing plugin is reported as many kinds of exception
            extra = "plan-tpu" if self.device.platform == "tpu" else "plan-gpu"
            line = next(iter(str(error).splitlines()), "")[:160]
            raise ConfigError(
                f"--device={self.name}: no compiler for it here ({line}): pip install 'lljax[{extra}]'"
            ) from None


def target(name: str) -> Target:
    """h100-80g, h100-80g:8, v5e-8, v5p-128 (cores) ...

    Raises:
      ConfigError: no such device; the line lists those there are.
    """
    match = re.fullmatch(r"(v\d+[ep])-(\d+)|([a-z0-9-]+?)(?::(\d+))?", name)
    kind = match and (match[1] or match[3])
    if kind not in DEVICES:
        raise ConfigError(
            f"--device={name}: there are {', '.join(DEVICES)}; name several GPUs as h100-80g:8 and a TPU slice "
            "as v5e-8"
        )
    count = int(match[2] or match[4] or 1)
    device = DEVICES[kind]
    if device.platform == "tpu":
        count = count // 2 if kind == "v5p" else count
        if count not in _slices(device):
            names = ", ".join(sized(device, chips).name for chips in _slices(device))
            raise ConfigError(f"--device={name}: there is no such slice; there are {names}")
    return Target(name, device, count)


def counts(device: Device) -> tuple[int, ...]:
    """The numbers of devices of a kind that can be had, ascending."""
    return tuple(_slices(device)) if device.platform == "tpu" else (1, 2, 4, 8, 16, 32, 64)


def sized(device: Device, count: int) -> Target:
    """`count` devices of a kind, by the name that `target` reads."""
    if device.platform == "tpu":
        return Target(f"{device.name}-{count * (2 if device.name == 'v5p' else 1)}", device, count)
    return Target(f"{device.name}:{count}", device, count)


def _slices(device: Device) -> dict:
    return CUBE if device.name == "v5p" else FLAT


def _topology(target: Target):
    if target.device.platform == "tpu":
        shape = _slices(target.device)[target.count]
        # The compiler describes whole hosts of four chips or more; a single chip is a host cut down
        # to one.
        options = {"chips_per_host_bounds": (1, 1, 1), "num_slices": 1} if target.count == 1 else {}
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.device.name}:{shape}", **options
        )
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=_kind(target.device),
        target_config=_gpu(target.device),
        topology=f"1x1x{target.count}",
    )


def _kind(device: Device) -> str:
    """What JAX calls the device; by that name its kernels look up the architecture."""
    return next(kind for kind, name in KINDS.items() if name == device.name)


def _gpu(device: Device) -> str:
    """A GpuTargetConfigProto in text form."""
    major, minor, shared, cores, l2 = device.sm
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {l2} clock_rate_ghz: 1.7
      device_memory_size: {device.memory} shared_memory_per_block_optin: {shared - 1024}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{_kind(device)}" """
