import pytest
from cbbl_d2.modeling import CBBLBox2BoxTransform, CBBLBox2BoxTransformLinear


@pytest.fixture
def decoded(monkeypatch):
    """The ``(source boxes, decoded boxes)`` of each call of a C-BBL transform."""
    calls = []
    for transform in (CBBLBox2BoxTransform, CBBLBox2BoxTransformLinear):
        original = transform.apply_deltas

        def recorder(self, deltas, boxes, original=original):
            calls.append((boxes, original(self, deltas, boxes)))
            return calls[-1][1]

        monkeypatch.setattr(transform, "apply_deltas", recorder)
    return calls
