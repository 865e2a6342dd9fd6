"""The section of quantized exports."""

import json

from lljax.report.page import write_report


def write(folder, content):
    folder.mkdir(parents=True)
    (folder / "compression.json").write_text(content)


def test_every_quantized_export_has_a_row_and_a_picture(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    scheme = {"bits": 4, "kind": "int", "group": -1, "symmetric": True}
    report = {
        "recipe": {"method": "gptq", "layout": "awq", "scheme": scheme, "search": False},
        "bytes": 3_210_000,
        "layers": [
            {
                f"model.layers.{i}.self_attn.q_proj": {"error": 0.001 * i},
                f"model.layers.{i}.mlp.experts.3.up_proj": {"error": 0.02, "note": "damped by 0.1"},
            }
            for i in range(3)
        ],
    }
    write(tmp_path / "export" / "w4", json.dumps(report))
    bare = report | {"layers": [{"model.layers.0.mlp.up_proj": {"error": None}}]}
    write(tmp_path / "export" / "plain", json.dumps(bare))
    write(tmp_path / "export" / "broken", json.dumps({"recipe": 3}))
    page = write_report(tmp_path).read_text()
    assert "Quantized exports" in page and "3.2" in page
    assert "w4: output lost by each kernel" in page and "mlp.experts.up_proj" in page
    assert "plain: output lost" not in page
    assert "broken/compression.json" in page  # a note
