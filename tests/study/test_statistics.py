"""Comparisons of rows: against SciPy's tests, against counting, and by hand."""

import itertools

import numpy as np
import pytest
from scipy import stats

from merge_jax.study.statistics import holm, paired_difference


def signed_rank_by_counting(differences):
    """Returns the two-sided p of the signed-rank test: all signs of the ranks, counted."""
    differences = np.array([d for d in differences if d != 0])
    ranks = stats.rankdata(np.abs(differences))
    sums = [
        sum(r for r, up in zip(ranks, signs, strict=True) if up)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    observed = ranks[differences > 0].sum()
    return min(1.0, 2 * np.mean(np.array(sums) <= min(observed, ranks.sum() - observed) + 1e-9))


@pytest.mark.parametrize("n", [2, 5, 10, 30])
def test_without_ties_both_tests_are_scipys(n):
    values, others = np.random.default_rng(n).normal([[0.3], [0.0]], size=(2, n))
    found = paired_difference(values.tolist(), others.tolist())
    assert found.n == n
    assert found.mean == pytest.approx(np.mean(values - others))
    assert found.error == pytest.approx(stats.sem(values - others))
    assert found.p_t == pytest.approx(stats.ttest_rel(values, others).pvalue, rel=1e-6)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(values - others, method="exact").pvalue, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_with_ties_and_zeros_the_signed_rank_test_counts_all_signs(seed):
    values, others = np.random.default_rng(seed).integers(0, 4, size=(2, 9)) / 10  # 0.3 - 0.2 is not 0.2 - 0.1.
    found = paired_difference(values.tolist(), others.tolist())
    assert found.p_wilcoxon == pytest.approx(signed_rank_by_counting(np.rint(10 * (values - others))))
    assert found.p_t == pytest.approx(stats.ttest_rel(values, others).pvalue, rel=1e-6)


def test_cases_that_have_no_test():
    one = paired_difference([0.5], [0.25])
    assert one == (1, 0.25, None, None, None)
    same = paired_difference([0.5, 0.7], [0.5, 0.7])
    assert same == (2, 0.0, 0.0, 1.0, 1.0)
    shifted = paired_difference([0.3, 0.2, 0.9], [0.2, 0.1, 0.8])
    assert shifted.p_t is None
    assert shifted.error == 0
    assert shifted.p_wilcoxon == pytest.approx(0.25)
    with pytest.raises(ValueError, match="as many of either, one or more; got 2 and 1"):
        paired_difference([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_difference([], [])


def test_holm_by_hand():
    # Ascending: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
