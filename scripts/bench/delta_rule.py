"""The gated delta rule on a TPU that is not here: what XLA's form and the Pallas kernels become.

python scripts/bench/delta_rule.py --device=v5e-8 --length=32768

The heads are those of Qwen3.5-9B, on one chip. "bound" is the time to move the inputs and outputs
once at the bandwidth of the chip's memory. Nothing is run. The compiler chooses the layouts of
the arguments and results, as it does within a model.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import without_devices  # noqa: F401, before jax

# isort: split
import common
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from lljax.hardware.targets import target
from lljax.models.mixers import delta_rule, delta_tpu
from lljax.models.mixers.delta_rule import DeltaCarry, DeltaInputs

M, R, HEAD = 16, 2, 128  # key heads, value heads of each, size of both
FORMS = {"XLA": delta_rule.delta_rule, "kernel": delta_tpu.delta_rule}
Floats = tuple[jax.Array, ...]  # q, k, v, decay, beta and the state before the row


def programs(rule: Callable) -> dict[str, Callable]:
    """Forward: the outputs in bfloat16, as the norm after the rule reads them. Backward: forward
    and the gradients of all floats, from the gradient of the outputs.
    """

    def forward(x: Floats, segments: jax.Array) -> jax.Array:
        q, k, v, decay, beta, state = x
        carry = DeltaCarry(state, segments[:, 0])
        ins = DeltaInputs(q, k, v, decay, beta, segments)
        return rule(ins, carry)[0].astype(jnp.bfloat16)

    def backward(x: Floats, segments: jax.Array, d_out: jax.Array) -> Floats:
        return jax.vjp(lambda x: forward(x, segments), x)[1](d_out)[0]

    return {"forward": forward, "backward": backward}


def arguments(length: int) -> tuple[Any, Any, Any]:
    """Abstract inputs, segments and the gradient of the outputs, of one row."""

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    keys = shape(jnp.bfloat16, length, M, HEAD)
    values = shape(jnp.bfloat16, length, M, R, HEAD)
    gates = shape(jnp.float32, length, M, R)
    state = shape(jnp.float32, M, R, HEAD, HEAD)
    return (keys, keys, values, gates, gates, state), shape(jnp.int32, length), values


def measure(device: str, length: int, forms: list[str]) -> dict[str, dict[str, float]]:
    """CPU seconds of compiling, temporary bytes and the bound, by form and program."""
    chip = target(device)
    anywhere = Format(Layout.AUTO, SingleDeviceSharding(chip.devices()[0]))
    x, segments, d_out = arguments(length)
    rows = {}
    for form in forms:
        for name, program in programs(FORMS[form]).items():
            operands = (x, segments) if name == "forward" else (x, segments, d_out)
            lowered = jax.jit(program, in_shardings=anywhere, out_shardings=anywhere).lower(
                *operands
            )
            start = time.process_time()
            compiled = lowered.compile()
            seconds = time.process_time() - start
            memory = compiled.memory_analysis()
            assert memory is not None, "the TPU compiler reports it"
            results = jax.eval_shape(program, *operands)
            moved = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, results)))
            rows[f"{form} {name}"] = {
                "compiling": seconds,
                "temporary": memory.temp_size_in_bytes,
                "bound": moved / chip.device.bandwidth,
            }
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="v5e-8", help="TPU slice; one chip of it is used")
    parser.add_argument("--length", type=int, default=32_768, help="tokens of a row")
    parser.add_argument(
        "--forms", nargs="+", default=list(FORMS), choices=FORMS, help="forms to compile"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_args()
    rows = measure(flags.device, flags.length, flags.forms)
    if flags.json:
        print(json.dumps(rows))
        return
    columns = "program", "compiling, CPU s", "temporary, MB", "bound, ms"
    table = common.table(columns, left=columns[:1], title=f"{flags.length} tokens, {flags.device}")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['compiling']:.1f}",
            f"{row['temporary'] / common.MB:.0f}",
            f"{row['bound'] * 1e3:.1f}",
        )
    common.show(table)


if __name__ == "__main__":
    main()
