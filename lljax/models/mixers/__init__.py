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
        mode: reason for mixer in _mixers(layers) for mode, reason in mixer.refused_modes.items()
    }


def needs_order(layers: Iterable[LayerSpec]) -> bool:
    """Whether a mixer of these layers needs the tokens in the order of the row."""
    return any(mixer.ordered for mixer in _mixers(layers))


def _mixers(layers: Iterable[LayerSpec]) -> list[type[Mixer]]:
    return [MIXERS[name] for name in dict.fromkeys(layer.mixer for layer in layers)]
