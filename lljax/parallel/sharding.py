"""The device mesh, and where each kind of array lies on it: one table from logical axes to mesh
axes.
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lljax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS, TOKENS = ("data", "fsdp", "expert"), "sequence"  # what a batch [B, T] is cut along
# A weight is cut along these logical axes, and computed with in that form ...
VOCABULARY = ("sequence", "tensor")  # how is told in lljax.parallel.sharded_embedding
COMPUTED = {
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": VOCABULARY,
    "experts": ("expert",),
}
# ... and cut further over these mesh axes where it is kept; a layer's are gathered when its turn
# comes.
STORAGE = ("sequence", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a forward pass lies on a mesh; hashable, so that a compiled step depends on it.

    context_parallel: none | allgather | ulysses | ring | halo, see
      lljax.attention.context_parallel.
    zigzag: the tokens of a row were reordered for balance (`zigzag`).
    """

    mesh: Mesh
    context_parallel: str = "none"
    zigzag: bool = False

    @property
    def platform(self) -> str:
        """cpu | gpu | tpu, of the devices of the mesh: they may be descriptions of devices that are
        elsewhere.
        """
        return self.mesh.devices.flat[0].platform


def token_parts(layout: Layout | None) -> int:
    """Over how many devices the tokens of a row are spread; None is the layout of one device."""
    return 1 if layout is None else layout.mesh.shape[TOKENS]


def row_parts(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices=None,
) -> Mesh:
    """A mesh with axes (data, fsdp, expert, sequence, tensor) over all devices; one size may be -1
    and is inferred.

    Axis types are Auto: the compiler propagates shardings. (jax.make_mesh would default to
      Explicit.)

    Raises:
      ConfigError: the sizes do not make up the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).reshape(-1)
    given = sizes = {
        "data": data,
        "fsdp": fsdp,
        "expert": expert,
        "sequence": sequence,
        "tensor": tensor,
    }
    open_ = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_) == 1:
        sizes = sizes | {open_[0]: devices.size // known}
    if len(open_) > 1 or math.prod(sizes.values()) != devices.size:
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items())
        if devices.size == 1:
            raise ConfigError(
                f"{named}: there is one device, and nothing to spread over: leave them at 1 or -1 (in YAML "
                "sequence_parallel: true takes the devices there are)"
            )
        way_out = (
            f"{known} do not divide {devices.size}"
            if devices.size % known
            else "set exactly one of them to -1"
        )
        raise ConfigError(f"{named} do not make up the {devices.size} devices here: {way_out}")
    return Mesh(
        devices.reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def weight_spec(mesh: Mesh, axes: tuple, shape: tuple, *, kept: bool = True) -> PartitionSpec:
    """How a weight with these logical axes is cut where it is kept, or (`kept=False`) where it is
    computed with.

    The storage axes cut `vocab` or `embed` where they divide it, else the first of the other axes
    that they divide; what nothing divides is whole on every device.
    """

    def parts(names):
        return math.prod(mesh.shape[name] for name in names)

    spec = [
        COMPUTED[axis] if axis in COMPUTED and size % parts(COMPUTED[axis]) == 0 else ()
        for axis, size in zip(axes, shape)
    ]
    if kept:
        more = tuple(name for name in STORAGE if not any(name in cut for cut in spec))
        order = ("vocab", "embed", *COMPUTED)
        for i in sorted(
            (i for i, axis in enumerate(axes) if axis in order), key=lambda i: order.index(axes[i])
        ):
            if shape[i] % parts(spec[i] + more) == 0:
                spec[i] += more
                break
    return PartitionSpec(*spec)


def cut_alike(sharding: NamedSharding, shape: tuple) -> NamedSharding:
    """`sharding` for an array of another shape and the same rank: cut along those axes that still
    divide.
    """

    def cut(names):
        return math.prod(
            sharding.mesh.shape[name]
            for name in ((names,) if isinstance(names, str) else names or ())
        )

    spec = [names if size % cut(names) == 0 else None for names, size in zip(sharding.spec, shape)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def value_sharding(mesh: Mesh, axes: tuple, value, *, kept: bool = True):
    """Where the value of a Variable is kept, or computed with; of a quantised one, where each of
    its arrays is.
    """
    return each(
        lambda array, axes: NamedSharding(mesh, weight_spec(mesh, axes, array.shape, kept=kept)),
        value,
        axes,
    )


def each(f, value, axes: tuple):
    """f(array, its logical axes) of a value, or of the arrays that one is made of
    (lljax.models.quantize, .probe).
    """
    return value.each(f, axes) if hasattr(value, "each") else f(value, axes)


def gathered(variables, layout: Layout | None):
    """A tree of Variables of one layer of a stack in the form to compute with; their values no
    longer have the axis that their metadata begins with.
    """
    if layout is None:
        return variables

    def one(variable):
        value, axes = variable.get_value(), variable.get_metadata("axes")[1:]
        return variable.replace(
            jax.lax.with_sharding_constraint(
                value, value_sharding(layout.mesh, axes, value, kept=False)
            )
        )

    return jax.tree.map(one, variables, is_leaf=lambda x: isinstance(x, nnx.Variable))


def constrain_activations(x: jax.Array, layout: Layout | None) -> jax.Array:
    """x [B, T, ...] with its rows and tokens where the batch has them, whole along the rest."""
    if layout is None:
        return x
    spec = PartitionSpec(ROWS, TOKENS, *(None,) * (x.ndim - 2))
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Where int32 arrays [..., B, T] lie."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * (rank - 2), ROWS, TOKENS))


def put(x, where) -> jax.Array:
    """`x`, which every process holds alike, laid out as the sharding `where`; None is the default
    device.

    jax.device_put would send it round to see that it is alike, and finds that a NaN is not.
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


def zigzag(x: np.ndarray, parts: int) -> np.ndarray:
    """Tokens [..., T] in an order in which each of `parts` devices has as much causal attention to
    do as the others: device i of n holds the i-th chunk of 2n from the front and the i-th from the
    back. T % (2 * parts) == 0.
    """
    chunks = np.split(x, 2 * parts, axis=-1)
    return np.concatenate(
        [chunks[j] for i in range(parts) for j in (i, 2 * parts - 1 - i)], axis=-1
    )
