"""How the tokens of a row are mixed: the table of mixers. `LayerSpec.mixer` names a row."""

from collections.abc import Iterable

from lljax.models.mixers.attention import Attention
from lljax.models.mixers.mixer import Mixer
from lljax.models.mixers.mla import MLA
from lljax.models.spec import LayerSpec

MIXERS: dict[str, type[Mixer]] = {"attention": Attention, "mla": MLA}


def refused_modes(layers: Iterable[LayerSpec]) -> dict[str, str]:
    """Context-parallel modes that a mixer of these layers cannot run under: mode -> reason."""
    return {
        mode: reason
        for name in dict.fromkeys(layer.mixer for layer in layers)
        for mode, reason in MIXERS[name].refused_modes.items()
    }
