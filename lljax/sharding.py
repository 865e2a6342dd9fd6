"""The device mesh, and where each kind of array lives on it: one table from logical axes to mesh axes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lljax.errors import ConfigError

# A weight is spread over fsdp along its first listed axis that divides; rows of a batch over data and fsdp both.
RULES = {"vocab": "fsdp", "heads": "fsdp", "kv_heads": "fsdp", "mlp": "fsdp"}
ROWS = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices=None) -> Mesh:
    """A mesh with axes (data, fsdp) over all devices; one size may be -1 and is inferred.

    Axis types are Auto: the compiler propagates shardings. (jax.make_mesh would default to Explicit.)

    Raises:
      ConfigError: the sizes do not make up the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = devices.size // max(sizes)
    if sizes[0] * sizes[1] != devices.size:
        raise ConfigError(f"mesh.data={data} and mesh.fsdp={fsdp} do not make up the {devices.size} devices here: "
                          "set one of them to -1")
    return Mesh(devices.reshape(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def weight_sharding(mesh: Mesh, axes: tuple, shape: tuple) -> NamedSharding:
    """Where a weight with these logical axes lives; whole on every device where nothing divides."""
    spec = [None] * len(shape)
    for i, axis in enumerate(axes):
        target = RULES.get(axis)
        if target and shape[i] % mesh.shape[target] == 0:
            spec[i] = target
            break
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Where int32 arrays [..., B, T] live: B is the axis before the last, spread over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * (rank - 2), ROWS, None))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
