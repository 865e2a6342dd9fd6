import pytest
from serving.cases import a_model, tiny_engine


@pytest.fixture(scope="package")
def engine_and_decoder(tiny):
    """One engine for all tests of the room: its programs are compiled once."""
    return tiny_engine(tiny)


@pytest.fixture
def base(engine_and_decoder):
    """The tiny model under the name "base"."""
    engine, _ = engine_and_decoder
    return a_model("base", engine, engine.tokenizer, longest=200)
