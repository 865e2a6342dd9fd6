"""The body of a request is strict JSON."""

import pytest

from lljax.serving.body import parse_body
from lljax.serving.errors import ApiError


def test_an_object_is_read():
    assert parse_body('{"a": [1, "ä \\ud83d\\ude00"]}'.encode()) == {"a": [1, "ä 😀"]}


@pytest.mark.parametrize(
    "body,message",
    [
        (b"", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
def test_anything_else_is_refused(body, message):
    with pytest.raises(ApiError, match=message) as error:
        parse_body(body)
    assert error.value.status == 400
