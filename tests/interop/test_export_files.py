"""What stands beside the weights of an export."""

import hashlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import transformers
from families import our_logits

from lljax.data.template import PLAIN_TEMPLATE
from lljax.errors import ModelError
from lljax.interop import safetensors
from lljax.interop.export import export_merged, export_peft, export_split
from lljax.interop.huggingface import load_weights, tensors
from lljax.interop.open import open_base
from lljax.interop.tokenizer import PROBES
from lljax.models.decoder import Decoder
from lljax.models.families import spec_from_hf
from lljax.models.initialize import initialize
from lljax.parallel.rounding import cdiv

CODE = {
    "configuration_tiny.py": "from .shared_tiny import X\n",
    "shared_tiny.py": "import os\n",
    "modeling_tiny.py": "from .configuration_tiny import Y\n",
}
MAP = {
    "AutoConfig": "configuration_tiny.TinyConfig",
    "AutoModelForCausalLM": "modeling_tiny.TinyModel",
}
WRITTEN = {"model.safetensors", "lljax_export.json"}
LEFT = {"README.md", "inference.py"}  # of the base, not needed


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path, remove=(), **changes):
    content = {name: value for name, value in (read(path) | changes).items() if name not in remove}
    path.write_text(json.dumps(content, indent=4))


@pytest.fixture
def published(hf_folder):
    """A folder as its maker published it, not as transformers 5 saves it."""
    folder = hf_folder()
    (folder / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (folder / "special_tokens_map.json").write_text('{"eos_token":  "w1"}')
    (folder / "LICENSE.txt").write_text("A license")
    (folder / "README.md").write_text("not needed")
    (folder / "inference.py").write_text("named by no auto_map")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1,\n "top_p": 0.9}')
    for name, code in CODE.items():
        (folder / name).write_text(code)
    edit(
        folder / "config.json",
        remove=("rope_parameters",),
        auto_map=MAP,
        max_position_embeddings=160,
        rope_theta=10000.0,
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=1 << 60,
    )
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- copied
def test_a_kept_rope_leaves_every_file_as_it_was(published, trained, tmp_path):
    base, model = trained(published, "keep")
    export_merged(model, base, tmp_path / "out")
    unchanged = names(published) - WRITTEN - LEFT
    assert names(tmp_path / "out") == unchanged | WRITTEN
    for name in unchanged:
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes(), name


def test_a_stretched_rope_changes_lengths_in_two_files_alone(published, trained, tmp_path):
    edit(published / "config.json", max_position_embeddings=64)
    base, model = trained(published, "yarn")
    export_split(model, base, tmp_path / "out")
    out = tmp_path / "out" / "base"
    for name in names(published) - WRITTEN - LEFT - {"config.json", "tokenizer_config.json"}:
        assert (out / name).read_bytes() == (published / name).read_bytes(), name
    rope = {"rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings"}
    for name, fields in (("config.json", rope), ("tokenizer_config.json", {"model_max_length"})):
        old, new = read(published / name), read(out / name)
        assert {field for field in old | new if old.get(field) != new.get(field)} <= fields
        assert list(new)[: len(old)] == list(old) and (out / name).read_text().startswith(
            '{\n    "'
        )


def test_every_length_in_the_base_is_that_of_the_model(published, trained, tmp_path):
    edit(published / "config.json", max_position_embeddings=64, seq_length=64, model_max_length=64)
    edit(published / "generation_config.json", max_length=64)
    base, model = trained(published, "yarn")
    export_merged(model, base, tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    lengths = ("max_position_embeddings", "seq_length", "model_max_length")
    assert [config[name] for name in lengths] == [160] * 3
    generation = read(tmp_path / "out" / "generation_config.json")
    assert generation == {"eos_token_id": 1, "top_p": 0.9, "max_length": 160}


@pytest.mark.parametrize("length,written", [(1 << 60, 1 << 60), (32, 160)])
def test_a_tokenizer_is_as_long_as_the_model_reads(published, trained, tmp_path, length, written):
    edit(published / "tokenizer_config.json", model_max_length=length)
    base, model = trained(published, "keep")
    export_merged(model, base, tmp_path / "out")
    assert read(tmp_path / "out" / "tokenizer_config.json")["model_max_length"] == written


def test_a_link_out_of_the_folder_is_not_copied(published, trained, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (published / "LICENSE.txt").unlink()
    (published / "LICENSE.txt").symlink_to(tmp_path / "secret")
    base, model = trained(published, "keep")
    with pytest.raises(ModelError, match="LICENSE.txt: a link out of the model's folder"):
        export_merged(model, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_hubs_cache_is_copied(published, trained, tmp_path):
    snapshot, blobs = (tmp_path / "hub" / name for name in ("snapshots/0123", "blobs"))
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for file in published.iterdir():
        shutil.copy(file, blobs / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}.blob")
    base, model = trained(snapshot, "keep")
    export_merged(model, base, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\x00sentencepiece"


def test_what_transformers_5_saved_is_written_so_that_4_reads_it(hf_folder, trained, tmp_path):
    folder = hf_folder()
    edit(folder / "tokenizer_config.json", extra_special_tokens=["w7"])
    assert read(folder / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    base, model = trained(folder)
    export_merged(model, base, tmp_path / "out")
    config = read(tmp_path / "out" / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["w7"] and "extra_special_tokens" not in config
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 w7")["input_ids"] == [3, 7]


# ---------------------------------------------------------------- the end of a text, and templates
@pytest.mark.parametrize(
    "generation,config,written",
    [
        ({"eos_token_id": [1, 5], "top_p": 0.5}, {}, {"eos_token_id": [1, 5], "top_p": 0.5}),
        ({"eos_token_id": 5, "top_p": 0.5}, {}, {"eos_token_id": [5, 1], "top_p": 0.5}),
        ({"top_p": 0.5}, {}, {"top_p": 0.5, "eos_token_id": [1]}),
        (None, {"eos_token_id": 1}, None),
        (
            None,
            {"eos_token_id": 2, "bos_token_id": 3, "pad_token_id": None},
            {"bos_token_id": 3, "eos_token_id": [2, 1]},
        ),
    ],
)
def test_all_tokens_that_end_a_reply_are_named(
    hf_folder, trained, tmp_path, generation, config, written
):
    folder = hf_folder()
    edit(folder / "config.json", **config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    base, model = trained(folder)
    export_merged(model, base, tmp_path / "out")
    path = tmp_path / "out" / "generation_config.json"
    assert (read(path) if path.exists() else None) == written


def test_the_template_that_was_trained_goes_along(example, tmp_path):
    base, model = example
    for export, folder in ((export_merged, "."), (export_split, "base"), (export_peft, ".")):
        out = tmp_path / export.__name__
        commands = export(model, base, out, chat_template=PLAIN_TEMPLATE)
        assert (out / folder / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
        if export is not export_peft:
            tokenizer = transformers.AutoTokenizer.from_pretrained(out / folder)
            assert tokenizer.chat_template == PLAIN_TEMPLATE
    names = {}
    exec(commands, names)
    assert names["tokenizer"].chat_template == PLAIN_TEMPLATE


# ---------------------------------------------------------------- real tokenizers, other versions
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# By the name of a folder with tokenizer.json and tokenizer_config.json: the RoPE to train under,
# and a config.json as the makers of the model write it.
MODELS = {
    "llama2": (
        "linear",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 32000,
            "rope_scaling": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama3_1": (
        "keep",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "rope_theta": 500000.0,
            "max_position_embeddings": 160,
            "eos_token_id": [128001, 128008, 128009],
            "bos_token_id": 128000,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 20,
                "rope_type": "llama3",
            },
        },
    ),
    "qwen3": (
        "yarn",
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": 151936,
            "rope_theta": 1e6,
            "rope_scaling": None,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
    "gemma3": (
        "linear",
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "vocab_size": 262144,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh",
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 8,
            "bos_token_id": 2,
            "eos_token_id": [1, 106],
        },
    ),
    "deepseek_v3": (
        "keep",
        {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "vocab_size": 129280,
            "auto_map": MAP,
            "max_position_embeddings": 160,
            "num_key_value_heads": 4,
            "rope_theta": 10000,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 40,
                "type": "yarn",
            },
        },
    ),
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}


def write_published(folder, tokenizer: Path, config: dict, quantize: bool):
    """A folder as on the hub, around a real tokenizer; kernels in FP8 where `quantize`."""
    folder.mkdir()
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    for name, code in CODE.items() if "auto_map" in config else ():
        (folder / name).write_text(code)
    config = SIZES | config
    if config["model_type"] == "deepseek_v3":
        del config["head_dim"]
    written = config | ({"quantization_config": FP8} if quantize else {})
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    model = Decoder(spec_from_hf(config))
    initialize(model, 0, deviation=0.2)
    arrays = {}
    for name, array in tensors(model):
        if quantize and name.endswith("_proj.weight"):
            scale = np.abs(array).max() / 400
            blocks = [cdiv(side, 128) for side in array.shape]
            arrays[name + "_scale_inv"] = np.full(blocks, scale, np.float32)
            array = (array / scale).astype(ml_dtypes.float8_e4m3fn)
        arrays[name] = array
    layout = safetensors.layout(arrays.items())
    safetensors.write(folder / "model.safetensors", layout, lambda name: arrays[name])
    return folder


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    pieces = [
        *PROBES,
        *"abc XYZ 0123456789 .,;:!?()[]{}'\"\\/\n\t",
        "\u00e9",
        "\u4e2d\u6587",
        "\U0001f600",
        "the ",
        " of",
        "  ",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 20))) for _ in range(n)]


def our_logits_of(folder, tokens):
    """As lljax reads an exported folder."""
    base = open_base(str(folder))
    model = Decoder(spec_from_hf(base.config))
    load_weights(model, base, dtype=np.float32)
    return our_logits(model, np.asarray(tokens))[:, ::9]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_4_and_5_read_exports_of_real_tokenizers(trained, tmp_path, name):
    """LLJAX_PEER_PYTHONS: pythons with transformers 4.57 and 5, separated by colons.
    LLJAX_TOKENIZERS: a folder that holds a folder of this name."""
    pythons = list(filter(None, os.environ.get("LLJAX_PEER_PYTHONS", "").split(os.pathsep)))
    tokenizer = Path(os.environ.get("LLJAX_TOKENIZERS", "")) / name
    if not pythons or not (tokenizer / "tokenizer.json").is_file():
        pytest.skip("needs LLJAX_PEER_PYTHONS and LLJAX_TOKENIZERS")
    rope, config = MODELS[name]
    stretched = {"config.json", "tokenizer_config.json"} if rope != "keep" else set()
    bases = {
        kind: write_published(tmp_path / kind, tokenizer, config, kind == "fp8")
        for kind in ("dense", "fp8")
    }
    tokens = np.random.default_rng(0).integers(0, 30000, (1, 150))
    exports, wanted = {}, {}
    for kind, folder in bases.items():
        base, model = trained(folder, rope, targets=("o_proj",), also_train=("norm",))
        exports[f"{kind} merged"] = out = tmp_path / f"{kind} merged"
        export_merged(model, base, out)
        assert np.abs(our_logits_of(out, tokens) - our_logits(model, tokens)[:, ::9]).max() < 1e-3
        if kind == "dense":
            export_split(model, base, tmp_path / "split")
            exports["split"] = tmp_path / "split" / "base"
    for export, folder in exports.items():
        wanted[export] = our_logits_of(folder, tokens)
        own = bases[export.split()[0] if export != "split" else "dense"]
        changed = stretched | {"model.safetensors"}
        if "fp8" in export:
            changed = changed | {"config.json"}  # the dense weights need another
        assert names(own) <= names(folder)
        for file in names(own) - changed:
            assert (folder / file).read_bytes() == (own / file).read_bytes(), (export, file)
    texts, own_tokenizer = random_texts(1000), open_base(str(bases["dense"])).tokenizer()
    (tmp_path / "asked.json").write_text(
        json.dumps(
            {
                "texts": texts,
                "tokens": tokens.tolist(),
                "models": {**exports},
                "tokenizers": {**exports, "base": bases["dense"]},
            },
            default=str,
        )
    )
    for python in pythons:
        script = Path(__file__).with_name("peer.py")
        subprocess.run(
            [python, script, "asked.json", "out.npz"],
            cwd=tmp_path,
            check=True,
            env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )
        read = np.load(tmp_path / "out.npz")
        if str(read["version"]).startswith("4."):  # for 5 see lljax.interop.tokenizer
            ids = [own_tokenizer(text)["input_ids"] for text in texts]
            assert read["ids base"] == hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        for export in exports:
            assert read[f"ids {export}"] == read["ids base"], (python, export)
            assert read[f"template {export}"] == read["template base"]
            logits = read[f"logits {export}"]
            np.testing.assert_allclose(
                logits, wanted[export], atol=2e-4, rtol=1e-4, err_msg=f"{python} {export}"
            )
