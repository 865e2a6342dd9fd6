"""How the tokens of a row are mixed: the table of mixers. `LayerSpec.mixer` names a row."""

from collections.abc import Iterable

from lljax.models.mixers.attention import Attention
from lljax.models.mixers.gated_attention import GatedAttention
from lljax.models.mixers.gated_delta import GatedDelta
from lljax.models.mixers.mixer import Mixer
from lljax.models.mixers.mla import MLA
from lljax.models.spec import LayerSpec

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "gated_attention": GatedAttention,
    "gated_delta": GatedDelta,
    "mla": MLA,
}


def refused_modes(layers: Iterable[LayerSpec]) -> dict[str, str]:
    """Context-parallel modes that a mixer of these layers cannot run under: mode -> reason."""
    return {
        mode: reason for mixer in _mixers(layers) for mode, reason in mixer.refused_modes.items()
    }


def needs_order(layers: Iterable[LayerSpec]) -> bool:
    """Whether a mixer of these layers needs the tokens in the order of the row."""
    return any(mixer.ordered for mixer in _mixers(layers))


def refuses_branches(layers: Iterable[LayerSpec], token_parts: int = 1) -> str:
    """Why a model of these layers cannot read rows with answers that share a prompt; "" if it can.

    token_parts: devices that share the tokens of a row.
    """
    for name in dict.fromkeys(layer.mixer for layer in layers):
        if not MIXERS[name].branches:
            return (
                f"layers with the mixer {name!r} cannot read several answers after one prompt: "
                "their state follows the row from one answer to the next"
            )
        if MIXERS[name].ordered and token_parts > 1:
            return (
                f"layers with the mixer {name!r} read several answers after one prompt on a device "
                f"that holds whole rows, and mesh.sequence={token_parts} spreads their tokens: use "
                "mesh.sequence=1 with mesh.data, mesh.fsdp or mesh.tensor"
            )
    return ""


def _mixers(layers: Iterable[LayerSpec]) -> list[type[Mixer]]:
    return [MIXERS[name] for name in dict.fromkeys(layer.mixer for layer in layers)]
