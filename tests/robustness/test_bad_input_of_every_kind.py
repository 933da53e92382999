from collections import Counter

import pytest

pytest.importorskip("detectron2")

from tests.driver import run_scripts  # noqa: E402
from tests.robustness.cases import build, fault, good_training, state  # noqa: E402


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_kind_ends_in_one_line(tmp_path, step):
    """By default every fifth of the cases."""
    good = tmp_path / "good"
    assert run_scripts([["good", *good_training(good)]], tmp_path) == {"good": 0}
    before = state(good)
    (tmp_path / "cases").mkdir()
    cases = build(tmp_path / "cases", good)[::step]
    status = run_scripts([[str(i), *case.words] for i, case in enumerate(cases)], tmp_path)
    tried, wrong = Counter(), []
    for i, case in enumerate(cases):
        tried[case.kind] += 1
        errors = (tmp_path / f"{i}.err").read_text(errors="replace")
        reason = fault(case, status[str(i)], errors)
        if reason:
            wrong.append(f"{case.kind}: {case.name}: {reason}\n    {errors.strip()[-300:]}")
    print(f"tried {len(cases)}, right {len(cases) - len(wrong)}, wrong {len(wrong)}")
    print(", ".join(f"{kind} {number}" for kind, number in tried.items()))
    assert not wrong, "\n".join(wrong)
    assert state(good) == before
    assert not list(tmp_path.rglob("bomb_went_off"))
