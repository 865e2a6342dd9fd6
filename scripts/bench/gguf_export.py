"""GGUF exports beside llama.cpp: logits past the original context, greedy text, tokens, adapters.

python scripts/bench/gguf_export.py --llama_python=PYTHON [--model=models/smollm2.gguf]

PYTHON is one with llama-cpp-python. Without --model, random models of every family alone.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lljax.config.shipped import shipped_model
from lljax.interop.base import Base
from lljax.interop.export import export_merged
from lljax.interop.gguf_lora import write_lora_gguf
from lljax.interop.gguf_write import write_gguf
from lljax.interop.huggingface import hf_shape, load_weights, parts_of
from lljax.interop.open import open_base
from lljax.models import lora, rope
from lljax.models.declare import declared
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.models.quantize import Form, Quantized
from lljax.models.spec import DecoderSpec

ORIGINAL = 128  # tokens that the random models read before they are stretched
SHAPE = {
    "vocab_size": 4096,  # of tiny-512, whose tokenizer they have
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": ORIGINAL,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 32,
    "long_factor": [1.0 + i / 4 for i in range(32)],
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "attention_factor": 1.4,
    "beta_fast": 16.0,
    "original_max_position_embeddings": ORIGINAL,
}
GEMMA = {"num_hidden_layers": 7, "query_pre_attn_scalar": 64, "sliding_window": 32}
# name: (fields of config.json, kind of RoPE at 1,024 tokens)
RANDOM: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, "yarn"),
    "llama, its RoPE yarn": (
        {"model_type": "llama", "rope_scaling": YARN, "max_position_embeddings": 1024},
        "keep",
    ),
    "llama, its RoPE llama3": (
        {"model_type": "llama", "rope_scaling": LLAMA3, "max_position_embeddings": 1024},
        "keep",
    ),
    "llama, its RoPE longrope": (
        {"model_type": "llama", "rope_scaling": LONGROPE, "max_position_embeddings": 1024},
        "keep",
    ),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, "linear"),
    "qwen2": ({"model_type": "qwen2"}, "linear"),
    "qwen3": ({"model_type": "qwen3", "head_dim": 128}, "yarn"),
    "gemma3": ({"model_type": "gemma3_text", "tie_word_embeddings": True} | GEMMA, "linear"),
    "gemma3, yarn": ({"model_type": "gemma3_text", "tie_word_embeddings": True} | GEMMA, "yarn"),
}


class RandomBase(Base):
    """Random weights under a config.json, with the tokenizer of tiny-512."""

    def __init__(self, config: dict[str, Any]):
        tiny = open_base(str(shipped_model("lljax/assets/tiny-512")))
        self.path, self.folder, self.whole = "random", tiny.folder, None
        self.config, self._tokenizer = config, tiny.tokenizer()
        parts = parts_of(Decoder(spec_from_hf(config)))
        self._shapes = {name: hf_shape(of[0][0]) for name, of in parts.items()}
        self._zero_is_one = "gemma" in config["model_type"]

    @property
    def generation_config(self) -> dict[str, Any] | None:
        return None

    @property
    def location(self) -> Path:
        assert self.folder is not None
        return self.folder

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(list(name.encode()))
        values = rng.normal(size=self.shape(name)).astype(np.float32)
        if values.ndim == 1:
            return values * 0.1 + (name.endswith("norm.weight") and not self._zero_is_one)
        return values / np.float32(np.sqrt(values.shape[1]))

    def stored(self, name: str, form: Form) -> Quantized | None:
        return None

    def checksum(self, name: str, before: int = 0) -> int:
        return before

    def fingerprint(self) -> str:
        return ""

    def tokenizer(self) -> Any:
        return self._tokenizer


@dataclasses.dataclass(frozen=True)
class Llama:
    """llama.cpp in another Python."""

    python: str
    folder: Path

    def run(self, model: Path, adapter: Path | None = None, **job: Any) -> dict[str, np.ndarray]:
        """What gguf_llama.py finds in this job."""
        (self.folder / "job.json").write_text(json.dumps(job))
        command = [self.python, str(Path(__file__).with_name("gguf_llama.py")), f"--model={model}"]
        command += [f"--job={self.folder / 'job.json'}", f"--out={self.folder / 'out.npz'}"]
        subprocess.run([*command, *([f"--lora={adapter}"] if adapter else [])], check=True)
        return dict(np.load(self.folder / "out.npz"))


def loaded(base: Base, spec: DecoderSpec) -> Decoder:
    model = Decoder(spec)
    load_weights(model, base, dtype=jnp.float32)
    return model


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logits(graph: nnx.GraphDef, state: nnx.State, ids: jax.Array, first: int) -> jax.Array:
    model = nnx.merge(graph, state)
    hidden = model(ids, positions=jnp.arange(ids.shape[1])[None])
    return model.logits(hidden[:, first:])[0]


def our_logits(model: Decoder, tokens: list[int], first: int = 0) -> np.ndarray:
    """The logits [T, V] in float32, from position `first` on."""
    return np.asarray(_logits(*nnx.split(model), jnp.asarray([tokens]), first))


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The largest difference and the range of the logits."""
    return float(np.abs(ours - theirs).max()), float(ours.max() - ours.min())


def stretched(spec: DecoderSpec, kind: str, length: int) -> DecoderSpec:
    longer = rope.extend(
        spec.rope, type=kind, factor="auto", length=length, max_length=spec.max_length
    )
    return dataclasses.replace(spec, rope=longer, max_length=length)


def compare(
    llama: Llama, base: Base, spec: DecoderSpec, tokens: list[int], types: list[str], start: int
) -> Iterator[tuple[str, float, float, float]]:
    """For each type: its name, the largest difference of logits from position `start` on between
    llama.cpp and what our reader makes of the file, their range, and the share of positions with
    the same best token.
    """
    for type in types:
        file = llama.folder / f"model-{type}.gguf"
        write_gguf(base, spec, file, type=type)
        read = open_base(str(file))
        ours = our_logits(loaded(read, spec_from_hf(read.config)), tokens, start)
        theirs = llama.run(file, tokens=tokens, first=start)["logits"]
        same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        yield type, *difference(ours, theirs), same
        file.unlink()


def with_adapter(base: Base, spec: DecoderSpec, targets: tuple[str, ...]) -> Decoder:
    """A model with a trained adapter of random factors."""
    model = Decoder(spec)
    lora.attach(model, rank=8, alpha=16.0, targets=targets, rank_pattern=((r"v_proj", 4),))
    load_weights(model, base, dtype=jnp.float32)
    initialize(model, 0)
    rng = np.random.default_rng(0)
    for _, variable in declared(model):
        if variable.get_metadata("trainable"):
            shape = variable.get_value().shape
            variable.set_value(jnp.asarray(rng.normal(size=shape) * 0.05, jnp.float32))
    return model


def texts(count: int = 1000) -> list[str]:
    """Texts of many kinds: lines and paragraphs of the standard library, languages, code, spaces,
    emoji.
    """
    rng, found = np.random.default_rng(0), []
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    while len(found) < count * 6 // 10:
        source = files[rng.integers(len(files))].read_text(encoding="utf-8", errors="ignore")
        start = int(rng.integers(max(1, len(source) - 400)))
        found.append(source[start : start + int(rng.integers(1, 400))])
    pieces = [
        *("The quick brown fox", "don't", "I'LL", "x = [1, 22, 333, 4444]", "3.14159e-10"),
        *("\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "\ud55c\uad6d\uc5b4", "\u0440\u0443\u0441\u0441"),
        *("\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u0e44\u0e17\u0e22"),
        *("\u0928\u092e\u0938\u094d\u0924\u0947", "na\u00efve caf\u00e9", "\U0001f642\U0001f680"),
        *("\U0001f469\u200d\U0001f4bb", "\u00bd\u00b2\u2167", "\t", "\n\n", "    ", "\r\n", " "),
        *("\u00a0", "\u200b", "\u3000", "!!!???", "<b>&amp;</b>", "{{x}}", "//", "#include <a.h>"),
    ]
    while len(found) < count:
        chosen = rng.choice(len(pieces), int(rng.integers(1, 9)))
        found.append(
            " ".join(pieces[i] for i in chosen)
            if rng.random() < 0.5
            else "".join(pieces[i] for i in chosen)
        )
    return found


def same_tokens(llama: Llama, file: Path, tokenizer: Any, given: list[str]) -> int:
    """The number of texts that llama.cpp and transformers make the same tokens of."""
    found = llama.run(file, texts=given)
    theirs = np.split(found["ids"], np.cumsum(found["lengths"])[:-1])
    return sum(
        list(ids) == tokenizer(text, verbose=False)["input_ids"]
        for text, ids in zip(given, theirs, strict=True)
    )


def random_models(llama: Llama) -> None:
    table = common.table(
        ("model", "RoPE", "type", "difference", "range", "share of the range", "same best token"),
        left=("model", "RoPE", "type"),
        title="Logits of random models at positions 128 to 700",
    )
    tokens = np.random.default_rng(0).integers(1, 4096, 700).tolist()
    for name, (fields, kind) in RANDOM.items():
        base = RandomBase(SHAPE | fields)
        spec = stretched(spec_from_hf(base.config), kind, 1024)
        for type, off, width, same in compare(llama, base, spec, tokens, ["f32", "f16"], ORIGINAL):
            share = f"{off / width:.1e}"
            table.add_row(
                name, spec.rope.type, type, f"{off:.1e}", f"{width:.1f}", share, f"{same:.3f}"
            )
    common.show(table)


def random_adapter(llama: Llama) -> None:
    """An adapter of every matrix, embedding and head included, beside its base in float32."""
    base = RandomBase(SHAPE | {"model_type": "llama"})
    spec = stretched(spec_from_hf(base.config), "linear", 1024)
    model = with_adapter(base, spec, ("all-linear", "embed_tokens", "lm_head"))
    tokens = np.random.default_rng(0).integers(1, 4096, 300).tolist()
    file, adapter = llama.folder / "base.gguf", llama.folder / "adapter.gguf"
    write_gguf(base, spec, file, type="f32")
    options = write_lora_gguf(model, base, adapter)
    theirs = llama.run(file, adapter, tokens=tokens, first=0)["logits"]
    off, width = difference(our_logits(model, tokens), theirs)
    moved, _ = difference(our_logits(loaded(base, spec), tokens), theirs)
    common.show(
        f"adapter of a random llama, in f32: difference {off:.1e} of a range of {width:.1f}; it "
        f"moves logits by {moved:.1f}. Options: {' '.join(options)}"
    )


def smollm2(llama: Llama, model: str, length: int | None) -> None:
    """length: the context to stretch from; None for the model's own."""
    source = open_base(model)
    if length:
        source.config |= {"max_position_embeddings": length}
    original = spec_from_hf(source.config)
    folder = llama.folder / "hf"
    export_merged(loaded(source, original), source, folder, dtype="float32")
    base = open_base(str(folder))
    text = "".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("c*.py"))[:4])
    length = original.max_length + 256
    tokens = base.tokenizer()(text, verbose=False)["input_ids"][:length]
    table = common.table(
        ("RoPE", "type", "difference", "range", "share of the range", "same best token"),
        left=("RoPE", "type"),
        title=f"Logits of {Path(model).name} at positions {original.max_length} to {length}",
    )
    for kind, types in (("yarn", ["f16", "q8_0", "q4_0"]), ("linear", ["f16"])):
        spec = stretched(original, kind, 2 * original.max_length)
        for type, off, width, same in compare(
            llama, base, spec, tokens, types, original.max_length
        ):
            share = f"{off / width:.1e}"
            table.add_row(spec.rope.type, type, f"{off:.1e}", f"{width:.1f}", share, f"{same:.3f}")
    common.show(table)
    spec = stretched(original, "yarn", 2 * original.max_length)
    file = llama.folder / "smollm2-f16.gguf"
    write_gguf(base, spec, file, type="f16")
    prompt, count = tokens[:256], 64
    theirs = llama.run(file, prompt=prompt, greedy=count)["greedy"].tolist()
    ours, written = loaded(base, spec), list(prompt)
    while len(written) < len(prompt) + count:
        padded = written + [0] * (len(prompt) + count - len(written))
        written.append(int(our_logits(ours, padded)[len(written) - 1].argmax()))
    agree = next((i for i in range(count) if theirs[i] != written[256 + i]), count)
    common.show(f"greedy text in f16: the first {agree} of {count} tokens are equal")
    given = texts()
    same = same_tokens(llama, file, base.tokenizer(), given)
    common.show(f"tokens: {same} of {len(given)} texts have the same")
    trained = with_adapter(base, spec, ("all-linear",))
    adapter = llama.folder / "adapter.gguf"
    options = write_lora_gguf(trained, base, adapter)
    f32 = llama.folder / "smollm2-f32.gguf"
    write_gguf(source, spec, f32, type="f32")  # a GGUF base, whose tokenizer is copied
    with_lora = llama.run(f32, adapter, tokens=tokens[:512], first=0)["logits"]
    off, width = difference(our_logits(trained, tokens[:512]), with_lora)
    moved, _ = difference(our_logits(ours, tokens[:512]), with_lora)
    common.show(
        f"adapter: difference {off:.1e} of a range of {width:.1f}; it moves logits by {moved:.1f}. "
        f"Options: {' '.join(options)}"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--llama_python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--model", help="SmolLM2 as a GGUF file (make smollm2)")
    parser.add_argument("--original", type=int, help="stretch as if it read so many tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llama = Llama(arguments.llama_python, Path(folder))
        random_models(llama)
        random_adapter(llama)
        if arguments.model:
            smollm2(llama, arguments.model, arguments.original)


if __name__ == "__main__":
    sys.exit(main())
