"""The shape of a decoder, which a family reads from a HuggingFace `config.json`
(lljax.models.families).

Letters: D model width, N query heads, K key/value heads, H head size, F MLP width, V vocabulary,
L layers, E experts.
"""

import dataclasses
import math

from lljax.models import rope
from lljax.models.rope import RopeSpec, Temperature


@dataclasses.dataclass(frozen=True)
class BesideNorms:
    """HF names of the norms of an MLP and of the experts beside it. Both read the residual, each
    through a norm of its own, and the router reads it without a norm; what they return is added.
    """

    before_mlp: str
    after_mlp: str
    before_experts: str
    after_experts: str


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """Mixture of experts in place of the MLP, or beside it: its sizes, and how tokens are routed.

    score: the function of router logits: softmax | sigmoid.
    best_first: the top k experts are chosen by logit and only their logits are scored; otherwise
      they are chosen by score.
    normalize: the weights of a token's experts sum to 1; then they are multiplied by `scale`.
    groups, best_groups: experts are chosen from the best groups only, by the sum of the two best
      scores of a group.
    correction: a bias per expert that counts in the choice and not in the weight.
    on_input: the weight multiplies the input of an expert, not its output.
    fused: HF keeps the experts of a layer in one tensor, and gate and up in another: [E, in, out],
      one after the other ("halves") or interleaved by column ("turns"); or [E, out, in], one after
      the other ("rows"). bias: experts and router have biases.
    clamp: (alpha, limit) of gate * sigmoid(alpha gate) * (up + 1), where gate is clamped from above
      and up on both sides; None for activation(gate) * up.
    beside: the experts stand beside the MLP of the layer; None for experts in its place.
    router_scales: HF names, in the block, of the scales of the router: of its input, which is
      normalized and divided by sqrt(D), and of the weight of each expert; None for no scales.
    """

    E: int  # routed experts
    k: int  # experts per token
    F: int  # MLP width of one expert
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    best_groups: int = 1
    correction: bool = False
    best_first: bool = False
    on_input: bool = False
    fused: str = ""
    bias: bool = False
    clamp: tuple[float, float] | None = None
    beside: BesideNorms | None = None
    router_scales: tuple[str, str] | None = None
    shared: int = 0  # MLP width of the expert that every token takes; 0 for none
    shared_gate: bool = False  # its output is multiplied by a sigmoid of the token
    # HF names below the layer: the block, "" for the layer itself; the router, its correction and
    # the shared expert in it; gate, up and down of an expert.
    block: str = "mlp"
    router: str = "gate"
    correction_name: str = "gate.e_score_correction_bias"
    correction_axes: int = 1  # 2 if HF keeps it as [1, E]
    shared_name: str = "shared_experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class MLASpec:
    """The sizes of multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, sec. 2.1)."""

    q_rank: int | None  # rank of the latent of queries; None if queries have none
    kv_rank: int  # rank of the latent of keys and values
    rope: int  # dimensions of a query or key that RoPE rotates
    v: int  # dimensions of a value


@dataclasses.dataclass(frozen=True)
class DeltaSpec:
    """The sizes of a gated delta network (Yang et al. 2024, arXiv 2412.06464)."""

    M: int  # key heads
    R: int  # value heads of a key head
    k: int  # size of a key
    v: int  # size of a value
    taps: int  # inputs of the convolution of a channel
    fused: bool = False  # HF keeps the projections of a key head together, as in Qwen3-Next


@dataclasses.dataclass(frozen=True)
class MLPNames:
    """HF names of an MLP: the block below the layer; gate and up in one tensor, or None for
    gate_proj and up_proj; down.
    """

    block: str = "mlp"
    gate_up: str | None = None
    down: str = "down_proj"


@dataclasses.dataclass(frozen=True)
class Norms:
    """HF names of the norms of a layer, of what mixer and MLP read and return; None for no norm."""

    before_mixer: str | None = "input_layernorm"
    after_mixer: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclasses.dataclass(frozen=True)
class QKNorm:
    """Norms of queries and keys, by default of every head before RoPE.

    whole: over all heads together. after_rope: after RoPE. names: HF names.
    """

    whole: bool = False
    after_rope: bool = False
    names: tuple[str, str] = ("q_norm", "k_norm")


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """The heads of a layer whose keys and values differ from those of other layers."""

    K: int  # key/value heads
    H: int  # head size
    keys_are_values: bool = False  # k_proj makes both; there is no v_proj


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The properties that may differ between the layers of one decoder."""

    window: int | None = None  # tokens that a query sees, itself included; None for full attention
    rope: int | None = 0  # index in `DecoderSpec.ropes`; None for no RoPE
    moe: bool = False  # experts (`DecoderSpec.moe`) in place of the MLP, or beside it
    chunked: bool = False  # the window does not slide: a document is cut into chunks of its size
    mixer: str = "attention"  # a row of lljax.models.mixers.MIXERS
    heads: HeadSpec | None = None  # None for K and H of the decoder, see `DecoderSpec.heads_of`


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The shape of a decoder. Hashable, and so a static argument of compiled programs."""

    family: str  # HF `model_type`
    V: int
    D: int
    N: int
    K: int
    H: int
    F: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec  # the RoPE that is stretched to read longer rows
    max_length: int  # tokens that the model reads
    norm_eps: float
    tied: bool  # the head is the embedding
    more_ropes: tuple[RopeSpec, ...] = ()  # the RoPE of other layers, see `ropes`
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm | None = None
    qk_unit: bool = False  # queries and keys are normalized after RoPE, without a weight
    v_unit: bool = False  # values are normalized, without a weight
    interleaved: bool = False  # RoPE pairs neighboring dimensions
    sinks: bool = False  # attention sinks, see lljax.attention.attend
    temperature: Temperature | None = None
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    norms: Norms = Norms()
    activation: str = "silu"  # activation of the MLP: silu | gelu_tanh
    fused_qkv: bool = False  # HF keeps q, k and v in one tensor
    mlp: MLPNames = MLPNames()
    embed_scale: float = 1.0  # factor of embeddings
    residual_scale: float = 1.0  # factor of what mixer and MLP add to the residual
    layer_scale: str | None = None  # HF name of the factor of a layer's output; None for 1
    attention_scale: float | None = None  # factor of scores; None for H ** -0.5
    attention_softcap: float | None = None  # see lljax.attention.softcap
    logit_scale: float = 1.0  # factor of the hidden states that the head reads
    logit_softcap: float | None = None
    moe: MoESpec | None = None
    mla: MLASpec | None = None
    delta: DeltaSpec | None = None

    @property
    def L(self) -> int:
        return len(self.layers)

    @property
    def has_experts(self) -> bool:
        return any(layer.moe for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Every RoPE of the decoder, indexed by `LayerSpec.rope`."""
        return (self.rope, *self.more_ropes)

    def heads_of(self, layer: LayerSpec) -> HeadSpec:
        """Key/value heads and head size of a layer."""
        return layer.heads or HeadSpec(self.K, self.H)

    @property
    def kv_parts(self) -> int:
        """The most devices to which the key/value heads of every layer can be dealt."""
        return math.gcd(*(self.heads_of(layer).K for layer in self.layers))

    @property
    def key_size(self) -> int:
        """Numbers of the keys of a token, in the layer that has the most."""
        return max(heads.K * heads.H for heads in map(self.heads_of, self.layers))

    def rotary(self, index: int = 0) -> int:
        """The dimensions of a head that the RoPE of this index may rotate: the head size of the
        layers that have it.
        """
        if self.mla:
            return self.mla.rope
        sizes = {self.heads_of(layer).H for layer in self.layers if layer.rope == index}
        assert len(sizes) <= 1, "layers with heads of several sizes have a RoPE each"
        return sizes.pop() if sizes else self.H

    @property
    def scale(self) -> float:
        """The factor of attention scores, the same in all layers: where head sizes differ,
        `attention_scale` is given.
        """
        if self.mla and rope.KINDS[self.rope.type].scales and self.rope.mscale_all_dim:
            return self.H**-0.5 * rope.yarn_magnitude(self.rope, self.rope.mscale_all_dim) ** 2
        return self.H**-0.5 if self.attention_scale is None else self.attention_scale


def repeats(layers: tuple[LayerSpec, ...]) -> list[tuple[int, tuple[LayerSpec, ...], int]]:
    """The layers as repeated patterns: (first layer, pattern, times), one after the other.

    The longest stretch comes first, with the shortest pattern that makes it. Nearly every model is
    one pattern of one layer.
    """
    patterns, first = [], 0
    while first < len(layers):
        best = (1, 1)  # layers of the pattern, times
        for period in range(1, (len(layers) - first) // 2 + 1):
            pattern, times = layers[first : first + period], 1
            while layers[first + times * period : first + (times + 1) * period] == pattern:
                times += 1
            if times > 1 and times * period > best[0] * best[1]:
                best = period, times
        period, times = best
        patterns.append((first, layers[first : first + period], times))
        first += period * times
    return patterns


def stacked(layers: tuple[LayerSpec, ...]) -> list[tuple[int, int]]:
    """Where each layer is: (number of its stack in the order of `repeats`, place in the stack)."""
    places, stacks = [], 0
    for _, pattern, times in repeats(layers):
        places += [(stacks + offset, i) for i in range(times) for offset in range(len(pattern))]
        stacks += len(pattern)
    return places
