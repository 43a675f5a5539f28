import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_jax as mj
from merge_jax.objectives.spans import exact_match, f1, normalize_answer, squad_scores

LENGTH, VOCABULARY = 7, 11
ANSWERS = [["one"], [], ["two three", "three"], ["four"], []]


def apply_fn(variables, tokens, *, train):
    """A model of tokens `[B, L]` to logits `[B, L, 2]`."""
    return jnp.stack([jnp.sin(tokens + 1.0), jnp.cos(2.0 * tokens)], axis=-1)


def arrays(size=5):
    random = np.random.default_rng(0)
    start = random.integers(0, LENGTH, size).astype(np.int32)
    end = np.minimum(start + random.integers(0, 3, size), LENGTH - 1).astype(np.int32)
    tokens = random.integers(0, VOCABULARY, (size, LENGTH)).astype(np.int32)
    return {"tokens": tokens, "start": start, "end": end, "example": (np.arange(size) % len(ANSWERS)).astype(np.int32)}


def span_by_hand(logits, start, end):
    """Losses and whether both ends are right, one example at a time, in float64."""
    losses, right = [], []
    for z, *ends in zip(np.asarray(logits, np.float64), start, end, strict=True):
        each = [np.log(np.exp(z[:, i]).sum()) - z[ends[i], i] for i in range(2)]
        losses.append(sum(each) / 2)
        right.append(all(z[:, i].argmax() == ends[i] for i in range(2)))
    return np.array(losses), np.array(right)


def constant(logits):
    """A model that gives these logits, whatever its input."""
    return lambda variables, tokens, **options: (jnp.asarray(logits), {}) if "mutable" in options else logits


def test_the_loss_equals_its_equation():
    batch = arrays(6)
    logits = np.random.default_rng(1).normal(size=(6, LENGTH, 2)).astype(np.float32) * 3
    # The first has both ends right, the next two have one.
    for index, shifts in enumerate([(0, 0), (0, 1), (1, 0)]):
        for column, shift in enumerate(shifts):
            right_place = (batch["start"], batch["end"])[column][index]
            logits[index, (right_place + shift) % LENGTH, column] = 20
    losses, right = span_by_hand(logits, batch["start"], batch["end"])
    assert right[:3].tolist() == [True, False, False]
    loss, (_, metrics) = mj.objectives.span_loss(constant(logits))({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert set(metrics) == {"accuracy"}
    np.testing.assert_allclose(metrics["accuracy"], right.mean())


def test_evaluation_hands_all_logits_to_decode_and_scores_all_answers():
    data, seen = arrays(), []

    def decode(logits, given):
        seen.append(logits)
        assert given is data
        return ["one", "", "a three", "", "five"]

    metrics = mj.objectives.evaluate_spans(apply_fn, decode, ANSWERS, batch_size=2)({}, {}, data)
    logits = apply_fn({}, data["tokens"], train=False)
    [on_host] = seen
    assert isinstance(on_host, np.ndarray)
    assert on_host.dtype == np.float32
    np.testing.assert_allclose(on_host, logits, rtol=1e-4, atol=1e-5)
    losses, _ = span_by_hand(logits, data["start"], data["end"])
    assert metrics == {
        "loss": pytest.approx(losses.mean(), rel=1e-5),
        "exact_match": pytest.approx(3 / 5),
        "f1": pytest.approx(3 / 5),
    }


def test_answers_are_those_of_the_question_with_the_number_in_the_arrays():
    data = arrays(3) | {"example": np.array([3, 2, 2], np.int32)}
    evaluate = mj.objectives.evaluate_spans(
        constant(np.zeros((3, LENGTH, 2))), lambda *_: ["four", "three", "two"], ANSWERS
    )
    metrics = evaluate({}, {}, data)
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert metrics["loss"] == pytest.approx(np.log(LENGTH), rel=1e-6)


def test_bad_input_is_named():
    data = arrays()
    evaluate = mj.objectives.evaluate_spans(apply_fn, lambda logits, arrays: [""], ANSWERS)
    with pytest.raises(ValueError, match=r"^the batch has no 'token'; did you mean 'tokens'"):
        mj.objectives.span_loss(apply_fn, inputs="token")({}, {}, data, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"^logits must be \[B, L, 2\] and 'start' \[B\], got shapes \(5, 2\) and \(5,\)"
    ):
        mj.objectives.span_loss(constant(np.zeros((5, 2))))({}, {}, data, jax.random.key(0))
    with pytest.raises(ValueError, match=r"^decode must give an answer to each of 5 examples, got 1$"):
        evaluate({}, {}, data)
    with pytest.raises(ValueError, match=r"^arrays\['example'\] must lie in \[0, 5\), .* found 0 to 5$"):
        evaluate({}, {}, data | {"example": np.array([0, 5, 0, 0, 0])})


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
    scores = mj.objectives.squad_scores(["Denver", "", "x", "the cat"], [["Denver Broncos"], [], [], ["dog", "cat"]])
    assert scores == {"exact_match": pytest.approx(2 / 4), "f1": pytest.approx((2 / 3 + 1 + 0 + 1) / 4)}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"^every question needs one prediction, got 1 for 2 questions$"):
        squad_scores(["a"], [["a"], []])
    with pytest.raises(ValueError, match=r"^cannot score no predictions$"):
        squad_scores([], [])
    with pytest.raises(ValueError, match=r"^answers must be a sequence of texts, got the text 'Paris'$"):
        squad_scores(["Paris"], ["Paris"])
