"""Files whose bytes are changed at random are read, or refused in one line: no other exception, no
hang, no memory, and no file outside the folder.
"""

import contextlib
import json
import resource
import signal
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from lljax.config import default_config
from lljax.data.tokens import prepare
from lljax.errors import LljaxError
from lljax.interop import safetensors
from lljax.interop.open import open_base, tokenizer_fingerprint
from lljax.interop.peft import load_adapter, read_adapter_config
from lljax.models import lora
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf

pytestmark = pytest.mark.faults
MUTATIONS, SECONDS, MEMORY = 1_000, 10, 1 << 30
# Wrong sizes, names and kinds in JSON.
VALUES = [
    b"0",
    b"-1",
    b"1.5",
    b"1e400",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"9223372036854775808",
    b"1" * 400,
    b'"\\u0000"',
    b'"\\ud800"',
    b'"../x"',
    b'"/etc/passwd"',
    b'"a.safetensors"',
    b"[[[]]]",
    b'{"a": {}}',
]
opened: list[str] | None = None  # while a file is read: the files opened


def audit(event, arguments):
    if event == "open" and opened is not None and isinstance(arguments[0], str | bytes):
        opened.append(str(arguments[0]))


sys.addaudithook(audit)


def mutated(content: bytes, rng, until: int, safetensors: bool = False) -> bytes:
    """`content` with one to four changes before byte `until`. Of a safetensors header every other
    one is given its new length: else the length alone would give nearly all of them away.
    """
    new = bytearray(content[:until])
    for _ in range(rng.integers(1, 5)):
        at, size = int(rng.integers(len(new) + 1)), int(rng.integers(1, 9))
        match rng.integers(6):
            case 0:
                new[at : at + 1] = bytes([new[at] ^ 1 << rng.integers(8)]) if at < len(new) else b""
            case 1:
                new[at : at + size] = rng.bytes(size)
            case 2:
                new[at:at] = new[max(0, at - 20 * size) : at]
            case 3:
                del new[at : at + size]
            case 4:
                new[at : at + 8] = b"\xff" * 7 + bytes([rng.choice([0x00, 0x7F, 0xFF])])
            case 5:  # in JSON, another value
                after = (
                    next((i for i in range(at, len(new)) if new[i : i + 1] in b":[,"), len(new)) + 1
                )
                stop = next(
                    (i for i in range(after, len(new)) if new[i : i + 1] in b",]}"), len(new)
                )
                new[after:stop] = VALUES[rng.integers(len(VALUES))]
    if safetensors and rng.integers(2):
        new[:8] = max(0, len(new) - 8).to_bytes(8, "little")
    return bytes(new) + content[until:]


@contextlib.contextmanager
def limits():
    """A case that takes too long or too much memory raises."""

    def late(*_):
        raise TimeoutError(f"not done after {SECONDS} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- files
class Target:
    """path: the file that is changed, before byte `until`. read(): everything that reads it."""

    def __init__(self, path: Path, read, until: int | None = None):
        self.path, self.read, self.until = (
            path,
            read,
            path.stat().st_size if until is None else until,
        )


def header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def rows(folder, tokenizer):
    lines = [
        {"text": "first return second"},
        {"query": "a", "response": "b", "history": [["c", "d"]]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a", "completion": "b"},
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, runs = default_config().data, iter(range(10**9))
    data.train, data.max_bad_fraction = (str(path),), 0.0

    def read():
        return prepare(
            data,
            tokenizer,
            len(tokenizer),
            folder / str(next(runs)) / "data",
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )

    return Target(path, read)


def write_shards(folder):
    arrays = {f"t{i}": np.full((4, 3), i, np.float32) for i in range(4)}
    safetensors.write_sharded(
        folder, safetensors.layout(arrays.items()), lambda name: arrays[name], max_shard_bytes=100
    )


def read_tensors(folder):
    found = safetensors.Folder(folder)
    return [np.asarray(found.read(name)).tobytes() for name in found.names()]


def shard_header(folder, tokenizer):
    write_shards(folder)
    path = folder / "model-00001-of-00002.safetensors"
    return Target(path, lambda: read_tensors(folder), header(path))


def index(folder, tokenizer):
    write_shards(folder)
    return Target(folder / safetensors.INDEX, lambda: read_tensors(folder))


def gguf_header(folder, tokenizer):
    N, K, H, D, F, L = 4, 2, 8, 32, 32, 1
    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:80], "ab", "<s>", "</s>"]
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("embedding_length", D),
        ("feed_forward_length", F),
        ("block_count", L),
        ("context_length", 64),
        ("attention.head_count", N),
        ("attention.head_count_kv", K),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(words))
    writer.add_bos_token_id(len(words) - 2)
    writer.add_eos_token_id(len(words) - 1)
    shapes = {
        "token_embd": (len(words), D),
        "output_norm": (D,),
        "blk.0.attn_norm": (D,),
        "blk.0.ffn_norm": (D,),
        "blk.0.attn_q": (N * H, D),
        "blk.0.attn_k": (K * H, D),
        "blk.0.attn_v": (K * H, D),
        "blk.0.attn_output": (D, N * H),
        "blk.0.ffn_gate": (F, D),
        "blk.0.ffn_up": (F, D),
        "blk.0.ffn_down": (D, F),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read():
        base = open_base(str(path))
        base.fingerprint()
        base.tokenizer()
        spec_from_hf(base.config)
        return [base.read(name).shape for name in base.names()]

    return Target(path, read, read_offset(path))


def read_offset(path: Path) -> int:
    return int(gguf.GGUFReader(path).data_offset)


def write_adapter(folder, tiny):
    """An adapter in PEFT's format, and read() that puts it on the outline of its base."""
    spec = spec_from_hf(open_base(tiny).config)
    shapes = {"q_proj": (spec.N * spec.H, spec.D), "v_proj": (spec.K * spec.H, spec.D)}
    arrays = {}
    for i in range(spec.L):
        for name, (out, into) in shapes.items():
            start = f"base_model.model.model.layers.{i}.self_attn.{name}"
            arrays |= {
                f"{start}.lora_A.weight": np.ones((4, into), np.float32),
                f"{start}.lora_B.weight": np.ones((out, 4), np.float32),
            }
    path = folder / "adapter_model.safetensors"
    safetensors.write(path, safetensors.layout(arrays.items()), lambda name: arrays[name])
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": "base",
                "r": 4,
                "lora_alpha": 8.0,
                "rank_pattern": {"q_proj": 4},
                "alpha_pattern": {"q_proj": 8.0},
                "use_rslora": False,
                "use_dora": False,
                "bias": "none",
                "target_modules": ["q_proj", "v_proj"],
                "modules_to_save": None,
                "init_lora_weights": True,
            }
        )
    )

    def read():
        model = Decoder(spec)
        read_adapter_config(folder).attach(model)
        load_adapter(model, folder)

    return read


def adapter_config(folder, tiny):
    read = write_adapter(folder, tiny)
    return Target(folder / "adapter_config.json", read)


def adapter_header(folder, tiny):
    read = write_adapter(folder, tiny)
    return Target(
        folder / "adapter_model.safetensors", read, header(folder / "adapter_model.safetensors")
    )


def model_config(folder, tiny):
    (folder / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())

    def read():
        model = Decoder(spec_from_hf(open_base(str(folder)).config))
        lora.attach(model, rank=4, alpha=8.0, targets=("q_proj",))

    return Target(folder / "config.json", read)


TARGETS = {
    "JSONL": rows,
    "safetensors header": shard_header,
    "model.safetensors.index.json": index,
    "GGUF header": gguf_header,
    "adapter_config.json": adapter_config,
    "adapter safetensors header": adapter_header,
    "config.json": model_config,
}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes_are_read_or_refused_in_one_line(tiny, tokenizer, tmp_path, tally, name):
    global opened
    row, rng = tally(f"random bytes: {name}", MUTATIONS), np.random.default_rng(0)
    target = TARGETS[name](tmp_path, tokenizer if name == "JSONL" else tiny)
    whole = target.path.read_bytes()
    target.read()  # imports happen now, and the unchanged file is sound
    refused = 0
    for number in range(MUTATIONS):
        target.path.write_bytes(mutated(whole, rng, target.until, "safetensors h" in name))
        touched, wrong = [], None
        try:
            with limits():
                opened = touched
                target.read()
        except LljaxError as error:
            refused += 1
            wrong = str(error) if "\n" in str(error) else None
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        finally:
            opened = None
        outside = [path for path in touched if not Path(path).resolve().is_relative_to(tmp_path)]
        row.case(wrong is None and not outside, (number, wrong, outside))
    assert refused
    row.done()
