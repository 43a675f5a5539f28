import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_jax as mj
from merge_jax.objectives.squad import exact_match, f1, normalize_answer, squad_scores

WORDS = st.lists(st.sampled_from(["a", "an", "the", "The", "cat", "Cat,", "sat", "sat", "the-cat", "é", "--", "\t"]))
TEXTS = WORDS.map(" ".join) | st.text(max_size=12)


def words_of(text):
    """Normalised words, one character and one word at a time."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    spaced = re.sub(r"\w+", lambda match: " " if match[0] in ("a", "an", "the") else match[0], kept)
    return spaced.split()


def f1_of_words(prediction, answer):
    """Pairs equal words off, each once."""
    if not prediction or not answer:
        return float(prediction == answer)
    left, common = list(answer), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("  an  apple\na\tday ", "apple day"),
        ("theory of a theatre", "theory of theatre"),
        ("U.S.A.", "usa"),
        ("$1,000,000 (approx.)", "1000000 approx"),
        ("the", ""),
        ("a-b", "ab"),
        ("“quoted”", "“quoted”"),
        ("Œuvre THE É", "œuvre é"),
        ("a.", ""),
        ("rock'n'roll", "rocknroll"),
    ],
)
def test_normalisation_by_hand(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "overlap"),
    [
        ("Denver Broncos", ["the Denver Broncos."], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("in Denver Colorado", ["Denver Broncos", "Denver"], 0, 1 / 2),
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("Paris", ["London"], 0, 0),
        # No answer: either both are empty or nothing is right.
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("the", [], 1, 1),
        # An answer that normalises to nothing does not count where there is another, or else is no answer.
        ("", ["the", "Paris"], 0, 0),
        ("", ["the"], 1, 1),
    ],
)
def test_scores_by_hand(prediction, answers, exact, overlap):
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap)


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_scores_equal_an_independent_computation(prediction, answers):
    words = words_of(prediction)
    counted = [words_of(answer) for answer in answers if words_of(answer)] or [[]]
    assert normalize_answer(prediction) == " ".join(words)
    assert exact_match(prediction, answers) == any(words == answer for answer in counted)
    assert f1(prediction, answers) == pytest.approx(max(f1_of_words(words, answer) for answer in counted))


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_an_exact_match_is_a_whole_overlap_and_more_answers_hurt_no_prediction(prediction, answers):
    assert exact_match(prediction, answers) <= f1(prediction, answers) <= 1
    if normalize_answer(prediction):
        assert exact_match(prediction, [*answers, f"The {prediction}!"]) == 1
        assert f1(prediction, answers) >= f1(prediction, answers[:1])


def test_scores_of_a_set_are_means_and_fractions():
    scores = mj.squad_scores(["Denver", "", "x", "the cat"], [["Denver Broncos"], [], [], ["dog", "cat"]])
    assert scores == {"exact_match": pytest.approx(2 / 4), "f1": pytest.approx((2 / 3 + 1 + 0 + 1) / 4)}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"^every question needs one prediction, got 1 for 2 questions$"):
        squad_scores(["a"], [["a"], []])
    with pytest.raises(ValueError, match=r"^cannot score no predictions$"):
        squad_scores([], [])
    with pytest.raises(ValueError, match=r"^answers must be a sequence of texts, got the text 'Paris'$"):
        squad_scores(["Paris"], ["Paris"])
