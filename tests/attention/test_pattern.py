"""The kinds of stage attention, and the patterns that they make."""

import pytest

from lljax.attention.pattern import KINDS, AttentionPattern, Groups, group_size
from lljax.config import default_config


@pytest.mark.parametrize(
    "group,T,tokens", [(0.25, 4096, 1024), (0.25, 1001, 250), (0.1, 8, 2), (2048, 8192, 2048)]
)
def test_group_is_a_share_or_a_number_of_tokens(group, T, tokens):
    assert group_size(group, T) == tokens


def test_every_kind_makes_its_pattern_from_the_configuration():
    context = default_config().context
    context.group, context.window, context.anchors = 0.25, 100, 3
    context.implementation = "blockwise"
    patterns = {kind: KINDS[kind](context, 1024, (7,)) for kind in KINDS}
    assert patterns == {
        "full": AttentionPattern("full", implementation="blockwise"),
        "shifted": AttentionPattern("shifted", group=256, implementation="blockwise"),
        "window": AttentionPattern(
            "window", window=100, anchors=3, markers=(7,), implementation="blockwise"
        ),
    }
    assert all(patterns[kind].kind == kind for kind in KINDS)


def test_only_shifted_patterns_have_groups():
    assert AttentionPattern("window", window=8).groups is None
    assert AttentionPattern("shifted", group=64).groups == Groups(64, 32)
    assert AttentionPattern("shifted", group=64, shift=False).groups == Groups(64, 0)
