"""The two ends of the run that made lljax/assets/tiny-512; configs/tiny_base.py is the run itself.

python scripts/make_tiny_base.py begin data/tiny_base.jsonl     # tokenizer.json and config.json
python scripts/train.py --config=configs/tiny_base.py --workdir=runs/tiny_base
python scripts/make_tiny_base.py end runs/tiny_base             # model.safetensors
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from lljax.data import formats

ASSET = Path(__file__).parent.parent / "lljax" / "assets" / "tiny-512"
END = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
    "torch_dtype": "bfloat16",
}


def begin(data: str) -> None:
    """A byte-level BPE of 4,096 tokens from the documents, and the shape of the model."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=[END], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator((document.text for document in formats.read([data])), trainer)
    ASSET.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, model_max_length=512).save_pretrained(ASSET)
    (ASSET / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def end(workdir: str) -> None:
    """The weights of the run's last checkpoint, in bfloat16."""
    from lljax.interop.export import export_merged
    from lljax.restore import restore_run
    config, model, base = restore_run(workdir)
    with tempfile.TemporaryDirectory() as folder:
        export_merged(model, base, Path(folder) / "merged", dtype="bfloat16")
        shutil.copy(Path(folder) / "merged" / "model.safetensors", ASSET / "model.safetensors")


if __name__ == "__main__":
    {"begin": begin, "end": end}[sys.argv[1]](sys.argv[2])
