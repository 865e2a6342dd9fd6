import jax, numpy as np, pytest
from lljax.training import loop
from lljax.training.monitor import read_metrics

@pytest.mark.parametrize("format", ["nf4","nf4-double","int4","int8","fp8"])
def test_a(run_config, tmp_path, format):
    run_config.model.quantize = format
    run_config.context.schedule = ((4,32,"full"),)
    loop.train(run_config, tmp_path)
    print([r["loss"] for r in read_metrics(tmp_path) if "loss" in r])
