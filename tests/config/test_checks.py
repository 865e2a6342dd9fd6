"""Checks of single values."""

import pytest

from lljax.config.checks import Several, Value, any_of, number, one_of, pair, required, whole
from lljax.errors import ConfigError

TABLE = {"b": 1, "c": 2}


def refusal(check, value):
    with pytest.raises(ConfigError) as caught:
        check("name", value)
    return str(caught.value)


def test_a_value_that_does_not_hold_is_refused_in_its_words():
    even = Value(lambda x: x % 2 == 0, "even")
    even("name", 2)
    assert refusal(even, 3) == "name=3 is not even"


def test_choices_are_words_and_the_keys_of_the_owners_table():
    choice = one_of("a", owner=f"{__name__}:TABLE")
    assert choice.all() == ("a", "b", "c") and choice.wanted == "one of a, b, c"
    for word in "abc":
        choice("name", word)
    assert refusal(choice, "d") == "name='d' is none of a, b, c"
    assert "none of" in refusal(choice, ["a"])


def test_a_word_needs_no_import_of_the_owner():
    choice = one_of("a", owner="no.such.module:TABLE")
    choice("name", "a")
    with pytest.raises(ModuleNotFoundError):
        choice("name", "b")


def test_an_item_is_refused_by_its_place():
    assert refusal(Several(whole(1)), (1, 0)).startswith("name[1]=0 is not a whole number from 1")
    assert refusal(Several(whole(1)), 3) == "name=3 is not a tuple, such as ('a', 'b')"
    check = pair(one_of("a"), whole(1), ("a", 4))
    assert refusal(check, ("a", 0)).startswith("name[1]=0")
    assert refusal(check, ("a",)) == "name=('a',) is not a pair such as ('a', 4)"


def test_the_last_of_several_checks_says_why():
    check = any_of(number(0, 0), number(1, 9, "or it fails"))
    check("name", 0)
    check("name", 2)
    assert refusal(check, 0.5) == "name=0.5 is not a number from 1 to 9: or it fails"


@pytest.mark.parametrize("empty", ["", (), []])
def test_a_required_value_is_not_empty(empty):
    assert refusal(required(one_of("a"), "say a"), empty) == "name is empty: say a"
