"""The whole job on a pretrained model: SmolLM2-135M-Instruct learns from the standard library and
is exported to torch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from lljax.interop.export import export_merged
from lljax.report.records import read_metrics
from lljax.run.restore import restore_run

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_smollm2_trains_and_its_exports_give_our_logits_past_the_original_length(smollm2, tmp_path):
    def command(*arguments):
        environment = os.environ | {"XLA_FLAGS": ""}  # one device
        subprocess.run(
            [sys.executable, "-c", "from lljax.cli.main import run; run()", *arguments],
            cwd=ROOT,
            check=True,
            env=environment,
        )

    run, data = tmp_path / "run", tmp_path / "stdlib.jsonl"
    command("data", "stdlib", f"--out={data}")
    command(
        "train",
        "--config=configs/smollm2_16k.py",
        f"--workdir={run}",
        f"--config.model.path={smollm2}",
        "--config.context.schedule=((10,1024,'shifted'),(20,2048,'full'))",
        f"--config.data.train=('{data}',)",
        "--config.data.valid_fraction=0.0",
        "--config.optimizer.warmup_steps=2",
    )
    losses = [record["loss"] for record in read_metrics(run)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    command("export", f"--workdir={run}", "--format=peft")

    _, model, base = restore_run(run)
    # a GGUF base is exported in float16 otherwise
    export_merged(model, base, tmp_path / "merged", dtype="float32")
    text = "".join(path.read_text() for path in sorted(Path(os.__file__).parent.glob("c*.py"))[:4])
    tokens = np.array(base.tokenizer()(text)["input_ids"][:9_000])[None]
    places = np.r_[0:256, 8_192:8_448, 8_900:9_000]
    positions = np.arange(tokens.shape[1])[None]
    ours = np.asarray(
        jax.jit(lambda tokens: model.logits(model(tokens, positions=positions)[:, places]))(tokens)
    )

    def compare(theirs):
        with torch.inference_mode():
            logits = theirs.eval()(
                torch.from_numpy(tokens), logits_to_keep=torch.from_numpy(places)
            ).logits.numpy()
        np.testing.assert_allclose(logits, ours, atol=1e-3)

    load = transformers.AutoModelForCausalLM.from_pretrained
    compare(load(tmp_path / "merged"))
    source = {"pretrained_model_name_or_path": smollm2.parent, "gguf_file": smollm2.name}
    config = transformers.AutoConfig.from_pretrained(**source)
    config.update(json.loads((run / "export" / "peft" / "rope.json").read_text()))
    compare(
        peft.PeftModel.from_pretrained(
            load(**source, config=config, dtype=torch.float32), run / "export" / "peft"
        )
    )
