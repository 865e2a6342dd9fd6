"""What the transformers of another python makes of folders: peer.py IN.json OUT.npz.

See test_export_files.py."""

import hashlib
import json
import sys

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
asked = json.load(open(sys.argv[1]))
out = {"version": transformers.__version__}
for name, folder in asked["tokenizers"].items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    out[f"ids {name}"] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    out[f"template {name}"] = str(tokenizer.chat_template)
for name, folder in asked["models"].items():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        out[f"logits {name}"] = model(torch.tensor(asked["tokens"])).logits.float().numpy()[:, ::9]
np.savez(sys.argv[2], **out)
