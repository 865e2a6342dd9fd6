import pytest

from lljax.config import default_config
from lljax.run import loop


@pytest.fixture(scope="session")
def two_steps(tmp_path_factory, tiny, documents):
    """A run of two steps with a checkpoint at each; to be copied by tests that change it."""
    c = default_config()
    c.model.path, c.model.dtype = tiny, "float32"
    c.context.length, c.context.schedule = 32, ((2, 32, "full"),)
    c.lora.rank, c.lora.also_train, c.context.rope.type = 2, (), "keep"
    c.data.train, c.training.rows, c.checkpoint.every_steps = (documents,), 8, 1
    c.optimizer.warmup_steps = 0
    folder = tmp_path_factory.mktemp("two_steps") / "run"
    loop.train(c, folder)
    return folder
