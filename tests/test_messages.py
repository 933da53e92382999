import json

import pytest
from cbbl_d2.messages import count, explain_json_error, listed, short


def test_count():
    assert [count(n, "box", "boxes") for n in (0, 1, 2)] == ["0 boxes", "1 box", "2 boxes"]


def test_listed():
    assert listed([]) == ""
    assert listed(range(5)) == "0, 1, 2, 3, 4"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"


def test_short():
    assert short("x" * 58) == repr("x" * 58)
    assert short("x" * 59) == "'" + "x" * 56 + "..."
    assert short("a\nb") == r"'a\nb'"


def test_json_error_has_its_place():
    with pytest.raises(json.JSONDecodeError) as info:
        json.loads('{\n"a": [')
    assert explain_json_error(info.value).startswith("not valid JSON at line 2, column 7 (")
