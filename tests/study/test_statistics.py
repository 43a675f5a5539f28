"""Comparisons of rows: against the formula, and by hand."""

import numpy as np
import pytest
from scipy import stats

from merge_jax.study.statistics import holm, paired_difference


@pytest.mark.parametrize("n", [2, 5, 10, 30])
def test_the_paired_t_test_is_that_of_its_formula(n):
    values, others = np.random.default_rng(n).normal([[0.3], [0.0]], size=(2, n))
    found = paired_difference(values.tolist(), others.tolist())
    differences = values - others
    assert found.n == n
    assert found.mean == pytest.approx(np.mean(differences))
    assert found.error == pytest.approx(stats.sem(differences))
    t = np.mean(differences) / (np.std(differences, ddof=1) / np.sqrt(n))
    assert found.p_t == pytest.approx(2 * stats.t.sf(abs(t), n - 1), rel=1e-6)


def test_cases_that_have_no_test():
    one = paired_difference([0.5], [0.25])
    assert one == (1, 0.25, None, None)
    same = paired_difference([0.5, 0.7], [0.5, 0.7])
    assert same == (2, 0.0, 0.0, 1.0)
    shifted = paired_difference([0.3, 0.2, 0.9], [0.2, 0.1, 0.8])  # 0.3 - 0.2 is not 0.2 - 0.1.
    assert shifted.p_t is None
    assert shifted.error == 0
    with pytest.raises(ValueError, match="two equally long, nonempty sequences; got 2 and 1"):
        paired_difference([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])


def test_holm_by_hand():
    # Ascending: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
