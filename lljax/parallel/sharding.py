"""The device mesh, and how arrays are sharded on it: one table from logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lljax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS, TOKENS = ("data", "fsdp", "expert"), "sequence"  # the axes that cut a batch [B, T]
VOCABULARY = ("sequence", "tensor")  # see lljax.parallel.sharded_embedding
# Weights are computed with cut over these mesh axes, by logical axis ...
COMPUTED = {
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": VOCABULARY,
    "experts": ("expert",),
}
# ... and stored cut over these too. The weights of a layer are gathered when it is computed.
STORAGE = ("sequence", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a forward pass is spread over a mesh; hashable, so that a compiled step depends on it.

    context_parallel: "none" or a key of `lljax.attention.context_parallel.MODES`.
    zigzag: the tokens of a row were reordered for balance (`zigzag`).
    """

    mesh: Mesh
    context_parallel: str = "none"
    zigzag: bool = False

    @property
    def platform(self) -> str:
        """cpu | gpu | tpu. The devices of the mesh may be descriptions of devices elsewhere."""
        return self.mesh.devices.flat[0].platform


def token_parts(layout: Layout | None) -> int:
    """The number of devices that share the tokens of a row; 1 without a layout."""
    return 1 if layout is None else layout.mesh.shape[TOKENS]


def row_parts(mesh: Mesh) -> int:
    """The number of devices that share the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | np.ndarray | None = None,
) -> Mesh:
    """A mesh with axes (data, fsdp, expert, sequence, tensor) over all devices; one size may be -1
    and is inferred.

    Axis types are Auto: the compiler propagates shardings (jax.make_mesh defaults to Explicit).

    Raises:
      ConfigError: the product of the sizes is not the number of devices.
    """
    grid = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
    wanted: dict[str, int] = dict(zip(AXES, (data, fsdp, expert, sequence, tensor), strict=True))
    inferred = [axis for axis, size in wanted.items() if size == -1]
    known = math.prod(size for size in wanted.values() if size != -1)
    sizes = wanted | {inferred[0]: grid.size // known} if len(inferred) == 1 else wanted
    if len(inferred) > 1 or math.prod(sizes.values()) != grid.size:
        raise ConfigError(_mesh_error(wanted, known, grid.size))
    return Mesh(grid.reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_error(sizes: dict[str, int], known: int, devices: int) -> str:
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if devices == 1:
        return (
            f"{named}: there is one device, and nothing to spread over: leave them at 1 or -1 (in "
            "YAML sequence_parallel: true takes the devices there are)"
        )
    divides = devices % known == 0
    way_out = "set exactly one of them to -1" if divides else f"{known} do not divide {devices}"
    return f"{named} do not make up the {devices} devices here: {way_out}"


def weight_spec(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], *, stored: bool = True
) -> PartitionSpec:
    """How a weight with these logical axes is cut in storage, or (`stored=False`) in computation.

    The storage axes cut `vocab` or `embed` if they divide it, else the first of the other axes that
    they divide; an axis that nothing divides is whole on every device.
    """

    def parts(names):
        return math.prod(mesh.shape[name] for name in names)

    spec: list[tuple[str, ...]] = [
        COMPUTED[axis] if axis in COMPUTED and size % parts(COMPUTED[axis]) == 0 else ()
        for axis, size in zip(axes, shape, strict=True)
    ]
    if stored:
        more = tuple(name for name in STORAGE if not any(name in cut for cut in spec))
        order = ("vocab", "embed", *COMPUTED)
        for i in sorted(
            (i for i, axis in enumerate(axes) if axis in order), key=lambda i: order.index(axes[i])
        ):
            if shape[i] % parts(spec[i] + more) == 0:
                spec[i] += more
                break
    return PartitionSpec(*spec)


def sharding_for_shape(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`sharding` for an array of another shape and the same rank: cut along the axes that still
    divide.
    """

    def parts(names):
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(sharding.mesh.shape[name] for name in names)

    spec = [
        names if size % parts(names) == 0 else None
        for names, size in zip(sharding.spec, shape, strict=False)  # a spec may be shorter
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def value_sharding(mesh: Mesh, axes: tuple, value, *, stored: bool = True) -> Any:
    """The sharding of the value of a Variable in storage, or in computation; a tree of shardings
    for a quantized one.
    """
    return map_arrays(
        lambda array, axes: NamedSharding(
            mesh, weight_spec(mesh, axes, array.shape, stored=stored)
        ),
        value,
        axes,
    )


def map_arrays(f: Callable, value, axes: tuple) -> Any:
    """f(array, its logical axes) of a value, or a tree of it for a value that is made of several
    arrays (`lljax.models.quantize`, `lljax.models.probe`).
    """
    return value.each(f, axes) if hasattr(value, "each") else f(value, axes)


def gather_for_compute(variables, layout: Layout | None):
    """The Variables of one layer, sharded for computation. Values cut out of a stack no longer have
    the leading axis of their metadata.
    """
    if layout is None:
        return variables

    def one(variable):
        value, axes = variable.get_value(), variable.get_metadata("axes")
        axes = axes[-len(value.shape) :]
        return variable.replace(
            jax.lax.with_sharding_constraint(
                value, value_sharding(layout.mesh, axes, value, stored=False)
            )
        )

    return jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def constrain_activations(x: jax.Array, layout: Layout | None) -> jax.Array:
    """x [B, T, ...] with rows and tokens sharded as in the batch, whole along the other axes."""
    if layout is None:
        return x
    spec = PartitionSpec(ROWS, TOKENS, *(None,) * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """The sharding of arrays [..., B, T] of a batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * (rank - 2), ROWS, TOKENS))


def put(x, where: jax.sharding.Sharding | None) -> jax.Array:
    """`x`, which every process holds, with the sharding `where`; None is the default device.

    jax.device_put would compare it between processes, and NaN differs from NaN.
    """
    if (
        where is None
        or where.is_fully_addressable
        or isinstance(x, jax.Array)
        and not x.is_fully_addressable
    ):
        return jax.device_put(x, where)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda at: x[at])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def unzigzag(x: np.ndarray, parts: int) -> np.ndarray:
    """The tokens [..., T] that `zigzag` ordered, in their first order."""
    order = [j for i in range(parts) for j in (i, 2 * parts - 1 - i)]
    chunks = np.split(x, 2 * parts, axis=-1)
    return np.concatenate([chunks[i] for i in np.argsort(order)], axis=-1)


def zigzag(x: np.ndarray, parts: int) -> np.ndarray:
    """Tokens [..., T] in an order that gives each of `parts` devices the same causal attention to
    compute: device i of n holds the i-th chunk of 2n from the front and the i-th from the back.

    T must be a multiple of 2 * parts.
    """
    chunks = np.split(x, 2 * parts, axis=-1)
    return np.concatenate(
        [chunks[j] for i in range(parts) for j in (i, 2 * parts - 1 - i)], axis=-1
    )
