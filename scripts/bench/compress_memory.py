"""Device memory of quantizing a model layer by layer, compiled for a device that is not there.

python scripts/bench/compress_memory.py --device=a10-24g --length=32768
python scripts/bench/compress_memory.py --device=h100-80g --model=configs/shapes/qwen3-235b-a22b

Weights and activations are bfloat16. Needs '.[plan-gpu]' or '.[plan-tpu]'; nothing runs.
"""

from typing import Any

import without_devices  # noqa: F401, before jax

# isort: split
import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lljax.compression import gptq
from lljax.compression.layers import abstract_layer, layer_programs
from lljax.compression.observe import linear_layers
from lljax.exports import TILE
from lljax.hardware.targets import target
from lljax.interop.layouts import Scheme
from lljax.interop.open import open_config
from lljax.models.families import spec_from_hf
from lljax.models.memory import Memory
from lljax.parallel.sharding import Layout, make_mesh


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="a10-24g")
    parser.add_argument("--length", type=int, default=1 << 15, help="of a calibration row")
    parser.add_argument("--model", help="a folder with a config.json, for Llama-3.1-8B's shapes")
    flags = parser.parse_args()
    spec = spec_from_hf(open_config(flags.model) if flags.model else common.LLAMA_3_8B)
    device = target(flags.device)
    mesh = make_mesh(devices=device.devices()[:1])
    placed = NamedSharding(mesh, PartitionSpec())

    def outline(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=placed), tree
        )

    layer = abstract_layer(spec, spec.L - 1)
    programs = layer_programs(spec, layer.layer, Layout(mesh), Memory(tile=TILE))
    weights = outline(nnx.as_pure(nnx.state(layer)), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, flags.length, spec.D), jnp.bfloat16, sharding=placed)
    row = jax.ShapeDtypeStruct((1, flags.length), jnp.int32, sharding=placed)
    sums = outline(jax.eval_shape(programs["observe"], weights, x, row, row, None))
    kernels = {
        name: linear.kernel.get_value().shape for name, linear in linear_layers(layer).items()
    }
    *_, inputs, outputs = max(kernels.values(), key=lambda shape: np.prod(shape[-2:]))
    rounding = {"scheme": Scheme(4), "stored": (np.dtype(jnp.bfloat16),) * 2, "search": False}
    kernel, gram, damp = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
        for shape in ((inputs, outputs), (inputs, inputs), ())
    )
    held = size(weights) + size(sums)  # while a kernel is rounded
    needs = {
        "observe a row": (programs["observe"].lower(weights, x, row, row, sums), 0),
        "run a row": (programs["forward"].lower(weights, x, row, row), 0),
        f"GPTQ of [{inputs:,}, {outputs:,}]": (
            gptq.solve.lower(kernel, gram, damp, **rounding),
            held,
        ),
    }
    table = common.table(
        ("program", "weights and sums GB", "peak GB", f"of {device.device.memory / common.GB:.1f}"),
        left=("program",),
        title=f"{flags.model or 'Llama-3.1-8B'}, rows of {flags.length:,}, {flags.device}",
    )
    for name, (lowered, beside) in needs.items():
        memory: Any = lowered.compile().memory_analysis()
        peak = beside + (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        share = peak / device.device.memory
        table.add_row(name, f"{held / common.GB:.2f}", f"{peak / common.GB:.2f}", f"{share:.0%}")
    common.show(table)


def size(tree: Any) -> int:
    """Bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
