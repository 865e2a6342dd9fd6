"""Before and after the two runs that made lljax/assets/tiny-512: the first learns code, the second
retrieval.

python scripts/make_tiny_base.py begin data/tiny_base.jsonl     # tokenizer.json and config.json
lljax train --config=configs/tiny_base.py --workdir=runs/tiny_base
python scripts/make_tiny_base.py end runs/tiny_base             # model.safetensors
python scripts/make_tiny_base.py recall data/recall.jsonl
lljax train --config=configs/tiny_base_recall.py --workdir=runs/tiny_base_recall
python scripts/make_tiny_base.py end runs/tiny_base_recall
"""

import argparse
import contextlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from lljax.data import formats
from lljax.evaluation import haystack, registry
from lljax.evaluation.task import Sources, TooShort
from lljax.interop.open import open_base
from lljax.parallel.rounding import cdiv

ASSET = Path(__file__).parent.parent / "lljax" / "assets" / "tiny-512"
END = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}
RECALL = (
    "passkey/tokens",
    "needle",
    "ruler/niah_single_1",
    "ruler/niah_single_2_local",
    "ruler/niah_multikey_1_local",
    "ruler/niah_multikey_2",
    "ruler/niah_multiquery_local",
    "ruler/niah_multivalue_local",
)
LENGTHS, SAMPLES, SEED = (160, 256, 384, 512), 250, 1000  # evaluations count their seeds from 0


def begin(data: str) -> None:
    """A byte-level BPE of 4,096 tokens from the documents, and the shape of the model."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(
        (row.text for row in formats.read([data]) if isinstance(row, formats.Document)), trainer
    )
    ASSET.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, model_max_length=512
    ).save_pretrained(ASSET)
    (ASSET / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def recall(out: str) -> None:
    """Retrieval questions of the benchmarks within 512 tokens, and lists of values to repeat in
    another order. A base that cannot copy would score nothing at any length.
    """
    tokenizer, rows, rng = open_base(str(ASSET)).tokenizer(), [], random.Random(1)
    for task in registry.find(RECALL, Sources()):
        for length in LENGTHS:
            # `needle` makes as many at each of 11 depths
            samples = cdiv(SAMPLES, 11) if task.name == "needle" else SAMPLES
            with contextlib.suppress(TooShort):
                rows += [
                    {"prompt": example.text, "completion": " " + ", ".join(example.answers)}
                    for example in task.examples(tokenizer, length, samples, SEED)
                ]
    nouns = haystack.words("noun")
    for _ in range(16 * SAMPLES):
        names = [
            rng.choice(nouns) + ("_" + rng.choice(nouns) if rng.random() < 0.5 else "")
            for _ in range(rng.randint(4, 12))
        ]
        lines = [
            f"{name} = {rng.randrange(10 ** rng.randint(2, 7))}\n" for name in dict.fromkeys(names)
        ]
        rows.append(
            {"prompt": "".join(lines) + "\n", "completion": "".join(rng.sample(lines, len(lines)))}
        )
    rng.shuffle(rows)
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))


def end(workdir: str) -> None:
    """The weights of the run's last checkpoint, in bfloat16."""
    from lljax.interop.export import export_merged
    from lljax.run.restore import restore_run

    config, model, base = restore_run(workdir)
    with tempfile.TemporaryDirectory() as folder:
        export_merged(model, base, Path(folder) / "merged", dtype="bfloat16")
        shutil.copy(Path(folder) / "merged" / "model.safetensors", ASSET / "model.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    for run, argument, help in (
        (begin, "data", "JSONL of documents"),
        (recall, "out", "the JSONL to write"),
        (end, "workdir", "folder of a finished run"),
    ):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("path", metavar=argument, help=help)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments.path)
