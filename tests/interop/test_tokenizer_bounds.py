import json
import resource
import shutil

import pytest

from lljax.errors import ModelError
from lljax.interop.open import open_base, tokenizer_fingerprint
from lljax.interop.tokenizer_bounds import growth


def replace(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


@pytest.fixture
def changed(tiny, tmp_path):
    """Opens the tiny model's tokenizer after a change to its tokenizer.json."""

    def opened(change):
        folder = shutil.copytree(tiny, tmp_path / "base")
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return open_base(str(folder)).tokenizer()

    return opened


@pytest.mark.parametrize(
    "part,expected",
    [
        (replace(" ", "_"), 1),
        (replace("a", ""), 1),
        (replace("``", "...."), 2),
        (replace("a+", "bbb", "Regex"), 3),
        ({"type": "NFC"}, 1),
        ({"type": "Sequence", "normalizers": [replace("a", "bb"), replace("b", "ccc")]}, 6),
        ({"type": "Sequence", "decoders": [replace("a", "bb"), {"type": "Fuse"}]}, 2),
    ],
)
def test_how_much_longer_a_normalizer_makes_a_text_is_seen_in_its_file(part, expected):
    assert growth(part) == expected


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_texts_longer_out_of_proportion_is_refused(changed, part):
    with pytest.raises(ModelError, match="makes a text up to 1,000 times longer") as raised:
        changed(lambda content: content.update({part: replace("a", "a" * 1000)}))
    assert "\n" not in str(raised.value)


def test_an_id_beyond_all_vocabularies_takes_no_memory(changed):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokenizer = changed(lambda content: content["model"]["vocab"].update(ZZZ=2**31))
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert tokenizer.convert_tokens_to_ids("ZZZ") == 2**31 and len(fingerprint) == 64
