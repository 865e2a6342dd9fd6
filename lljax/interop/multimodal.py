"""The text model of a multimodal model: its config.json, and the RoPE that the whole model keeps.

M-RoPE gives every token three positions, which are one for text: it is RoPE, and its own fields are
left out of the config.json of the text model.
"""

from typing import Any, NamedTuple

from lljax.errors import ModelError, short
from lljax.models.families import FAMILIES, rope_to_hf
from lljax.models.families.family import Family, MultimodalModel, Names
from lljax.models.spec import DecoderSpec

ROPE = ("rope_scaling", "rope_parameters")
M_ROPE = ("mrope_section", "mrope_interleaved")
# Fields that the whole model has in place of its text model, if that has none of its own.
SHARED = ("eos_token_id", "bos_token_id", "pad_token_id")
OF_THE_FILE = ("dtype", "torch_dtype", "quantization_config")


class Whole(NamedTuple):
    """The multimodal model that a base is the text model of, and the fields of its M-RoPE."""

    model: MultimodalModel
    m_rope: dict[str, Any]

    def rope(self, spec: DecoderSpec) -> dict[str, Any]:
        """The entries of text_config with the RoPE of a decoder, see `rope_to_hf`."""
        entries = rope_to_hf(spec)
        return entries | {name: entries[name] | self.m_rope for name in entries.keys() & set(ROPE)}


def text_model(config: dict) -> tuple[dict[str, Any], Whole | None]:
    """The config.json of the text model alone, and the multimodal model that it is a part of; None
    if config.json describes a text model.

    Its model_type is that of a family, also if the file has an alias (`Family.aliases`).

    Raises:
      ModelError: a multimodal model has no text_config, or one of an unknown model_type.
    """
    model_type = config.get("model_type")
    wholes = [
        (family, whole)
        for family in FAMILIES.values()
        for whole in family.multimodal_parents
        if whole.model_type == model_type
    ]
    if wholes:
        return _inner(config, wholes)
    for family in FAMILIES.values():
        if isinstance(model_type, str) and model_type in family.aliases:
            return _as_family(family, {**family.aliases[model_type], **config}), None
    return config, None


def names_on_disk(whole: MultimodalModel, stored: list[str]) -> Names:
    """How a checkpoint with these tensors names the text model's."""
    return next(
        (
            names
            for names in whole.names
            if any(name.startswith(f"{names.model}.") for name in stored)
        ),
        whole.names[0],  # and the first tensor is missing
    )


def _inner(
    config: dict, wholes: list[tuple[Family, MultimodalModel]]
) -> tuple[dict[str, Any], Whole]:
    family, whole = wholes[0]
    text = config.get("text_config")
    if text is None and whole.flat:
        nested = {name for name, value in config.items() if name.endswith("_config")}
        text = {
            name: value
            for name, value in config.items()
            if name not in nested - {"quantization_config"} and name != "model_type"
        }
    if not isinstance(text, dict):
        raise ModelError(
            f"config.json: model_type {whole.model_type!r} needs an object text_config, which "
            "describes its text model"
        )
    kind = text.get("model_type", family.model_type)
    known = {name: pair for pair in wholes for name in (pair[0].model_type, *pair[0].aliases)}
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(
            f"config.json: the text model of this {whole.model_type} has the model_type "
            f"{short(kind)}, which is not supported; supported are {', '.join(known)}"
        )
    family, whole = known[kind]
    tied = config.get("tie_word_embeddings", whole.tied) or text.get("tie_word_embeddings", False)
    shared = {name: config[name] for name in SHARED if name in config}
    of_the_file = {name: config[name] for name in OF_THE_FILE if name in config}
    text = {name: value for name, value in text.items() if name != "auto_map"}  # of other code
    fields = {**whole.defaults, **shared, **text, **of_the_file, "tie_word_embeddings": tied}
    given = [text[name] for name in ROPE if isinstance(text.get(name), dict)]
    m_rope = {field: rope[field] for rope in given for field in M_ROPE if field in rope}
    return _as_family(family, fields), Whole(whole, m_rope)


def _as_family(family: Family, config: dict) -> dict[str, Any]:
    """A config.json under the names of the family, with RoPE in place of M-RoPE."""
    config = config | {"model_type": family.model_type, "architectures": [family.architecture]}
    for name in ROPE:
        rope = config.get(name)
        if not isinstance(rope, dict):
            continue
        plain = {field: value for field, value in rope.items() if field not in M_ROPE}
        for field in ("type", "rope_type"):
            if plain.get(field) == "mrope":
                plain[field] = "default"
        scales = plain.keys() - {"type", "rope_type"} or "default" not in plain.values()
        config[name] = plain if scales else None
    return {name: value for name, value in config.items() if name not in ROPE or value is not None}
