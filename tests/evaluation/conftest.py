import pytest

from lljax.interop.open import open_base


@pytest.fixture(scope="session")
def tiny_512():
    """The tokenizer of the base that ships with lljax."""
    return open_base("lljax/assets/tiny-512").tokenizer()
