"""Student's quantiles, intervals and paired differences against values worked by hand."""

from __future__ import annotations

import pytest

from cmpose.evaluation.intervals import Interval, interval, paired, student_t


@pytest.mark.parametrize(  # two-sided 95 %, from printed tables
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423),
     (120, 1.9799)],
)  # fmt: skip
def test_students_quantiles(freedom, expected):
    assert student_t(freedom) == pytest.approx(expected, abs=5e-5)


def test_other_confidences():
    assert student_t(1, 0.5) == pytest.approx(1.0)
    assert student_t(9, 0.99) == pytest.approx(3.2498, abs=5e-5)
    for freedom, confidence in ((0, 0.95), (3, 1.0)):
        with pytest.raises(ValueError, match=f"freedom={freedom} .*confidence={confidence}"):
            student_t(freedom, confidence)


def test_an_interval_by_hand():
    # 1, 2, 6: mean 3, s² = (4 + 1 + 9) / 2 = 7, half = 4.3027 · √(7 / 3)
    mean = interval([1.0, 2.0, 6.0])
    assert mean == Interval(3.0, pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4), 3)
    assert mean.covers_zero
    assert mean.text() == "3.0 ± 6.6"
    assert interval([5.0, 5.2]).covers_zero is False
    assert interval([]) is None


def test_one_value_has_no_interval():
    mean = interval([5.0])
    assert mean == Interval(5.0, None, 1)
    assert mean.covers_zero is None
    assert mean.text(sign=True) == "+5.0"


def test_paired_differences_use_the_seeds_that_both_have():
    difference = paired({0: 10.0, 1: 20.0, 3: 7.0}, {0: 9.0, 1: 18.0, 2: 99.0})
    # 1 and 2: mean 1.5, s = 0.7071, half = 12.7062 · 0.5
    assert difference == Interval(1.5, pytest.approx(6.3531, rel=1e-4), 2)
    assert difference.covers_zero
    assert paired({0: 1.0}, {1: 1.0}) is None
