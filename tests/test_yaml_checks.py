import time

import pytest
from cbbl_d2.errors import ConfigError
from cbbl_d2.yaml_checks import check_yaml

LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def deep(depth):
    return "a: " + "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "not a config: it is empty"),
        ("# nothing\n", "not a config: it is empty"),
        ("- 1\n", "at the top it has a sequence"),
        ("text", "at the top it has a scalar"),
        ("a: [", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "line 3: the key a stands in line 1 already"),
        ("a:\n  b: 1\n  c:\n    - {d: 1, d: 2}\n", "line 4: the key d stands in line 4"),
        ("1: a\n", "line 1: the key 1 is no text"),
        ("a:\n  yes: 1\n", "line 2: the key yes is no text"),
        ("null: 1\n", "the key null is no text"),
        ("[1, 2]: a\n", "line 1: the key .* is no text"),
        (LAUGHS, "references .* more than 1000000 values"),
        ("a: &a [*a]\n", "or for themselves"),
        ("a: &a {b: {c: *a}}\n", "or for themselves"),
        (deep(3000), "nested too deeply"),
        ("_BASE_: x.yaml\n", "x.yaml: its _BASE_ .*x.yaml is based on itself"),
        ("_BASE_: ./sub/../x.yaml\n", "is based on itself"),
        ("_BASE_: y.yaml\n", "x.yaml: its _BASE_ .*y.yaml does not exist"),
        ("_BASE_: sub\n", "its _BASE_ .*sub: cannot be read"),
        ("_BASE_: [good.yaml, z.yaml]\n", "its _BASE_ .*z.yaml does not exist"),
        ("_BASE_: cycle.yaml\n", "is based on itself"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: \x00", "not valid YAML"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_one_line_in_no_time(tmp_path, content, words):
    (tmp_path / "sub").mkdir()
    (tmp_path / "good.yaml").write_text("a: 1\n")
    (tmp_path / "cycle.yaml").write_text("_BASE_: x.yaml\n")
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=words) as e:
        check_yaml(str(path))
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    assert time.perf_counter() - start < 20


def test_references_and_bases_that_are_fine(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("a: &a {b: 1}\nc: *a\nd:\n  <<: *a\n  e: 2\n")
    (tmp_path / "x.yaml").write_text("_BASE_: base.yaml\na: {b: !!python/tuple [1, 2]}\n")
    check_yaml(str(tmp_path / "x.yaml"))
