"""Eight CPU devices for every test, set before jax starts; and a tiny random model with a tokenizer
and documents.
"""

import collections
import functools
import json
import logging
import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the time goes to compiling, and what is compiled is small: machine code need not be
    # good.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        " --xla_backend_optimization_level=0"
        # How long a device waits for the others before it ends the process: on a busy machine they
        # take longer than the 40 seconds that XLA allows.
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
# XLA runs what they compute on as many threads as there are devices. A collective holds its thread
# until all eight have come, and two that are independent may be begun in either order: eight
# threads that wait for both wait for ever.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Much is compiled more than once: by tests, workers and the scripts they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="lljax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lljax.config import default_config
from lljax.interop import safetensors
from lljax.interop.huggingface import tensors
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.run.loop import train


def pytest_configure():
    # nohup and some schedulers start processes that ignore SIGHUP, and tests send it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # and shells start jobs in the background so that they ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves the slow ones out
def pytest_collection_modifyitems(items):
    """Of the cases of a test marked `sample(n)`, one in n stays; the others are slow."""
    cases = collections.Counter()
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        if cases[test] % sample.args[0]:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1


TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "bos_token_id": None,
}
TEXT = (
    "def add(first, second):\n    return first + second  # the sum of both\n\n"
    "class Thing:\n    name = 'thing'\n"
)


def write_base(folder, seed=0, **changes):
    """A random model in HF form, with a byte-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_config = TINY | changes
    model = Decoder(spec_from_hf(hf_config))
    initialize(model, seed, deviation=0.2)
    arrays = dict(tensors(model))
    safetensors.write(
        folder / "model.safetensors", safetensors.layout(arrays.items()), lambda name: arrays[name]
    )
    (folder / "config.json").write_text(json.dumps(hf_config))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return PreTrainedTokenizerFast.from_pretrained(tiny)


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A JSONL file of 40 texts of uneven length."""
    rng = np.random.default_rng(0)
    words = TEXT.split()
    path = tmp_path_factory.mktemp("documents") / "docs.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": " ".join(rng.choice(words, rng.integers(5, 120)))}) + "\n"
            for _ in range(40)
        )
    )
    return str(path)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as a GGUF file, which `make smollm2` brings."""
    path = Path(__file__).parent.parent / "models" / "smollm2.gguf"
    if not path.exists():
        pytest.skip("no models/smollm2.gguf: make smollm2")
    return path


def tiny_run_config(tiny: str, documents: str):
    """A configuration that trains in seconds: two stages, shifted and full, a row on every one of
    the eight devices.
    """
    c = default_config()
    c.model.path, c.model.dtype = tiny, "float32"
    c.context.length, c.context.schedule = 64, ((4, 32, "shifted"), (8, 64, "full"))
    c.lora.rank = 4
    c.data.train, c.data.valid_fraction = (documents,), 0.2
    c.training.rows, c.training.eval_rows = 8, 8
    c.checkpoint.every_steps = 3
    return c


@pytest.fixture(autouse=True)
def log_setup():
    """Commands that run in this process set the level of the log, and handlers that write to what
    stderr is during the test.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """The programs of all modules would reach the system's limit of memory maps, at which LLVM ends
    the process.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def run_config(tiny, documents):
    return tiny_run_config(tiny, documents)


@pytest.fixture
def train_on_one_device():
    """lljax.run.loop.train on one of the eight devices: for tests that need no mesh."""
    return functools.partial(train, devices=jax.devices()[:1])
