import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj

LENGTH, WORDS = 4, 9
VOCABULARY = ("yes", "no", "red", "2")
ANSWERS = [["yes"] * 9 + ["no"], ["red"], ["Two", "2", "3", "2."], ["blue"], ["no"] * 2 + ["yes"] * 8]
KINDS = ["yes/no", "other", "number", "other", "yes/no"]


def apply_fn(variables, images, tokens, *, train):
    """A model of images `[B, 2, 2, 1]` and tokens `[B, 4]` to logits `[B, 4]`."""
    return jnp.sin(images.reshape(-1, 4) + tokens.astype(jnp.float32))


def arrays(size=5):
    random = np.random.default_rng(0)
    example = (np.arange(size) % len(ANSWERS)).astype(np.int32)
    return {
        "image": random.integers(0, 256, (size, 2, 2, 1), np.uint8),
        "tokens": random.integers(0, WORDS, (size, LENGTH)).astype(np.int32),
        "answers": mj.objectives.answer_indices([ANSWERS[i] for i in example], VOCABULARY)[0],
        "example": example,
    }


def loss_by_hand(logits, answers):
    """One answer of one annotator at a time, in float64."""
    losses = []
    for z, given in zip(np.asarray(logits, np.float64), np.asarray(answers), strict=True):
        each = [np.log(np.exp(z).sum()) - z[answer] for answer in given if answer >= 0]
        losses.append(sum(each) / len(each) if each else 0.0)
    return np.array(losses)


def constant(logits):
    """A model that gives these logits, whatever its input."""
    return lambda variables, images, tokens, **options: (jnp.asarray(logits), {}) if "mutable" in options else logits


def one_hot(places):
    return 20 * np.eye(len(VOCABULARY), dtype=np.float32)[list(places)]


def test_the_loss_equals_its_equation():
    batch = arrays()
    assert (batch["answers"] < 0).all(axis=1).tolist() == [False, False, False, True, False]
    logits = np.random.default_rng(1).normal(size=(5, len(VOCABULARY))).astype(np.float32) * 3
    loss, (_, metrics) = mj.objectives.vqa_loss(constant(logits))({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, loss_by_hand(logits, batch["answers"]).mean(), rtol=1e-5)
    assert set(metrics) == {"accuracy"}


def test_the_loss_of_one_answer_is_cross_entropy_and_its_accuracy_an_exact_match():
    logits = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    answers = np.array([0, 1, 2, 3, 0, 0], np.int32)
    batch = {"image": 0, "tokens": 0, "answers": answers[:, None]}
    loss, (_, metrics) = mj.objectives.vqa_loss(constant(logits))({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, mj.cross_entropy(logits, answers).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], mj.accuracy(logits, answers))
    half = jnp.asarray(10 * logits, jnp.bfloat16)
    loss, _ = mj.objectives.vqa_loss(constant(half))({}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, mj.cross_entropy(half.astype(jnp.float32), answers).mean(), rtol=1e-6)


def test_the_loss_is_least_at_the_fractions_of_annotators():
    answers = np.array([[0] * 6 + [1] * 3 + [-1]], np.int32)
    batch = {"image": 0, "tokens": 0, "answers": answers}

    @jax.jit
    @jax.value_and_grad
    def slopes(logits):
        return mj.objectives.vqa_loss(constant(logits))({}, {}, batch, jax.random.key(0))[0]

    at_fractions = jnp.log(jnp.array([[2 / 3, 1 / 3, 1e-9, 1e-9]]))
    np.testing.assert_allclose(slopes(at_fractions)[1], np.zeros((1, 4)), atol=1e-6)


def test_an_example_without_answers_has_neither_loss_nor_gradient():
    batch = {"image": 0, "tokens": 0, "answers": np.full((2, 3), -1, np.int32)}

    @jax.jit
    @jax.value_and_grad
    def slopes(logits):
        return mj.objectives.vqa_loss(constant(logits))({}, {}, batch, jax.random.key(0))[0]

    loss, gradient = slopes(jnp.array([[1.0, 2, 3, 4], [1e4, 0, 0, -1e4]]))
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 4)))


def test_the_accuracy_is_that_of_the_texts():
    """Ten answers to each question, some not in the vocabulary, and none that all gave."""
    random = np.random.default_rng(3)
    answers = [[*random.choice(["yes", "no", "red", "blue"], 9, p=[0.6, 0.2, 0.1, 0.1]), "2"] for _ in range(40)]
    places = random.integers(0, 4, 40)
    batch = {"image": 0, "tokens": 0, "answers": mj.objectives.answer_indices(answers, VOCABULARY)[0]}
    _, (_, metrics) = jax.jit(mj.objectives.vqa_loss(constant(one_hot(places))))({}, {}, batch, jax.random.key(0))
    scores = mj.objectives.vqa_scores([VOCABULARY[place] for place in places], answers)
    assert 0.2 < scores["accuracy"] < 0.8
    np.testing.assert_allclose(metrics["accuracy"], scores["accuracy"], rtol=1e-6)


def test_an_answer_beyond_the_logits_is_not_passed_over():
    batch = {"image": 0, "tokens": 0, "answers": np.array([[4]], np.int32)}
    assert np.isnan(mj.objectives.vqa_loss(constant(np.zeros((1, 4), np.float32)))({}, {}, batch, jax.random.key(0))[0])


def test_evaluation_scores_the_largest_logits_of_all_examples():
    data = arrays()
    metrics = mj.objectives.evaluate_vqa(apply_fn, VOCABULARY, ANSWERS, KINDS, batch_size=2)({}, {}, data)
    logits = apply_fn({}, data["image"], data["tokens"], train=False)
    predictions = [VOCABULARY[place] for place in np.argmax(logits, axis=-1)]
    assert len(set(predictions)) > 1
    losses = loss_by_hand(logits, data["answers"])
    assert metrics == {
        "loss": pytest.approx(losses.mean(), rel=1e-5),
        **mj.objectives.vqa_scores(predictions, ANSWERS, KINDS),
    }
    predict = mj.objectives.predict_answers(apply_fn, VOCABULARY, batch_size=2)
    assert predict({}, {}, {name: data[name] for name in ("image", "tokens")}) == predictions


def test_scores_are_those_of_the_texts_by_kind():
    evaluate = mj.objectives.evaluate_vqa(constant(one_hot([0, 2, 3, 1, 1])), VOCABULARY, ANSWERS, KINDS)
    metrics = evaluate({}, {}, arrays())
    # Yes of nine, red alone, 2 of three in four, not blue, no of two.
    number = (3 * 2 / 3 + 1) / 4
    assert metrics.pop("loss") > 0
    assert metrics == {
        "accuracy": pytest.approx((1 + 1 + number + 0 + 0.6) / 5),
        "accuracy_number": pytest.approx(number),
        "accuracy_other": 1 / 2,
        "accuracy_yes/no": pytest.approx(1.6 / 2),
    }
    without = mj.objectives.evaluate_vqa(constant(one_hot([0, 2, 3, 1, 1])), VOCABULARY, ANSWERS)({}, {}, arrays())
    assert set(without) == {"loss", "accuracy"}


def test_answers_are_those_of_the_question_with_the_number_in_the_arrays():
    data = arrays(3) | {"example": np.array([4, 1, 1], np.int32)}
    evaluate = mj.objectives.evaluate_vqa(constant(one_hot([1, 2, 0])), VOCABULARY, ANSWERS, KINDS)
    metrics = evaluate({}, {}, data)
    assert metrics["accuracy"] == pytest.approx((0.6 + 1 + 0) / 3)
    assert metrics["accuracy_other"] == 1 / 2
    assert metrics["accuracy_yes/no"] == pytest.approx(0.6)


def test_bad_input_is_named():
    data = arrays()
    evaluate = mj.objectives.evaluate_vqa(apply_fn, VOCABULARY, ANSWERS)
    shapes = r"^logits must be \[B, C\] and 'answers' \[B, A\], got shapes "
    with pytest.raises(ValueError, match=shapes + r"\(5, 3, 4\) and \(5, 10\)$"):
        mj.objectives.vqa_loss(constant(np.zeros((5, 3, 4))))({}, {}, data, jax.random.key(0))
    with pytest.raises(ValueError, match=shapes + r"\(5, 4\) and \(5,\)$"):
        mj.objectives.vqa_loss(constant(np.zeros((5, 4))))(
            {}, {}, data | {"answers": data["answers"][:, 0]}, jax.random.key(0)
        )
    with pytest.raises(ValueError, match=r"^logits must be \[B, 2\], one of each answer, got shape \(5, 4\)"):
        mj.objectives.evaluate_vqa(apply_fn, ["yes", "no"], ANSWERS)({}, {}, data)
    with pytest.raises(ValueError, match=r"^logits must be \[B, 2\], one of each answer, got shape \(5, 4\)"):
        mj.objectives.predict_answers(apply_fn, ["yes", "no"])({}, {}, data)
    with pytest.raises(ValueError, match=r"^arrays\['example'\] must lie in \[0, 5\), .* found 0 to 5$"):
        evaluate({}, {}, data | {"example": np.array([0, 5, 0, 0, 0])})
    with pytest.raises(ValueError, match=r"^every question needs one kind, got 1 for 5 questions$"):
        mj.objectives.evaluate_vqa(apply_fn, VOCABULARY, ANSWERS, ["other"])
