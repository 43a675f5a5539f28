from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import merge_jax as mj
from merge_jax.objectives import retrieval

LENGTH, WORDS = 4, 9


class Pair(NamedTuple):
    image: jax.Array
    text: jax.Array
    scale: jax.Array


def unit(x):
    return x / (x**2).sum(axis=-1, keepdims=True) ** 0.5


def embed_images(variables, images, *, train):
    """Images `[B, 2, 2, 1]` to vectors `[B, 3]`."""
    return unit(jnp.cos(images.reshape(-1, 4)[:, :3].astype(jnp.float32)))


def embed_texts(variables, tokens, *, train):
    return unit(jnp.cos(tokens[:, :3] + jnp.float32(0.5)))


def pairs(num_images=7, captions_each=2, groups=None):
    """Arrays of all pairs that fit, in no order, of images and captions with numbers that are no rows."""
    random = np.random.default_rng(0)
    image_group = np.arange(num_images) if groups is None else np.arange(num_images) % groups
    caption_group = np.repeat(np.unique(image_group), captions_each)
    image, caption = np.nonzero(image_group[:, None] == caption_group[None])
    order = random.permutation(len(image))
    image, caption = image[order], caption[order]
    return {
        "image": random.integers(0, 256, (num_images, 2, 2, 1), np.uint8)[image],
        "tokens": random.integers(0, WORDS, (len(caption_group), LENGTH)).astype(np.int32)[caption],
        "image_id": 100 - image,
        "caption_id": 5 * caption + 3,
        "group": image_group[image],
    }


def recall_by_hand(similarity, query_group, candidate_group, k):
    """Sorts the candidates of one query at a time; those of other groups first where they tie."""
    hits = 0
    for row, group in zip(similarity.tolist(), query_group, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], candidate_group[j] == group))
        hits += any(candidate_group[j] == group for j in order[:k])
    return hits / len(similarity)


def loss_by_hand(image, text, group, scale):
    """One pair and one fitting partner at a time, in float64."""
    z = scale * np.asarray(image, np.float64) @ np.asarray(text, np.float64).T
    losses = []
    for i in range(len(z)):
        fitting = [j for j in range(len(z)) if group[j] == group[i]]
        to_text = [np.log(np.exp(z[i]).sum()) - z[i, j] for j in fitting]
        to_image = [np.log(np.exp(z[:, i]).sum()) - z[j, i] for j in fitting]
        losses.append((np.mean(to_text) + np.mean(to_image)) / 2)
    return np.array(losses)


@pytest.mark.parametrize(
    ("k", "expected"),
    # Query 0 has its candidate first, query 1 its better one second, query 2 its own last.
    [(1, 1 / 3), (2, 2 / 3), (3, 2 / 3), (4, 1)],
)
def test_recall_by_hand(k, expected):
    similarity = np.array([[9, 1, 2, 3], [5, 3, 4, 1], [9, 8, 7, 1]])
    assert mj.objectives.recall_at_k(similarity, np.array([0, 1, 2]), np.array([0, 1, 1, 2]), k) == pytest.approx(
        expected
    )


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_recall_equals_an_independent_computation(seed, levels):
    random = np.random.default_rng(seed)
    queries, candidates = random.integers(1, 6, 2)
    groups = random.integers(0, 3, queries)
    # Every group has a candidate, some have several; few levels make ties.
    candidate_group = random.permutation([0, 1, 2, *random.integers(0, 4, candidates)])
    similarity = random.integers(0, levels, (queries, len(candidate_group))).astype(np.float32)
    recalls = [
        mj.objectives.recall_at_k(similarity, groups, candidate_group, k) for k in range(1, len(candidate_group) + 1)
    ]
    expected = [recall_by_hand(similarity, groups, candidate_group, k + 1) for k in range(len(candidate_group))]
    assert recalls == pytest.approx(expected)
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, -np.inf, np.inf])
def test_what_is_all_the_same_finds_nothing(value):
    groups = np.arange(4)
    similarity = np.full((4, 4), value)
    assert [mj.objectives.recall_at_k(similarity, groups, groups, k) for k in (1, 3, 4)] == [0, 0, 1]


def test_scores_equal_an_independent_computation_however_they_are_divided(monkeypatch):
    random = np.random.default_rng(0)
    image_group = np.array([3, 0, 1, 2, 1, 4, 0, 5, 6, 7, 8, 9])
    text_group = random.permutation(np.repeat(np.arange(10), 3))
    images = unit(random.normal(size=(12, 6))).astype(np.float32)
    texts = unit(images[[list(image_group).index(group) for group in text_group]] + random.normal(size=(30, 6)) / 2)
    similarity = images @ texts.T
    expected = {
        f"image_to_text_recall_{k}": recall_by_hand(similarity, image_group, text_group, k) for k in (1, 5, 10)
    } | {f"text_to_image_recall_{k}": recall_by_hand(similarity.T, text_group, image_group, k) for k in (1, 5, 10)}
    assert len(set(expected.values())) > 3
    expected["mean_recall"] = sum(expected.values()) / 6
    scores = mj.objectives.retrieval_scores(images, texts, image_group, text_group)
    assert list(scores) == list(expected)
    assert scores == pytest.approx(expected)
    for at_a_time in (1, 70, 100):
        monkeypatch.setattr(retrieval, "_SIMILARITIES_AT_A_TIME", at_a_time)
        assert mj.objectives.retrieval_scores(images, texts, image_group, text_group) == scores


def test_both_directions_agree_where_images_and_texts_change_places():
    random = np.random.default_rng(1)
    images, texts = unit(random.normal(size=(2, 8, 3)))
    groups = np.arange(8)
    one = mj.objectives.retrieval_scores(images, texts, groups, groups, ks=(1, 3))
    other = mj.objectives.retrieval_scores(texts, images, groups, groups, ks=(1, 3))
    assert one["mean_recall"] == pytest.approx(other["mean_recall"])
    assert one["image_to_text_recall_3"] == other["text_to_image_recall_3"]
    assert set(mj.objectives.retrieval_scores(images, images, groups, groups, ks=[1]).values()) == {1.0}


def test_one_vector_for_everything_finds_nothing_whatever_its_rounding():
    """In float32 the product of equal vectors depends on their place in a matrix of this size."""
    vector = unit(np.random.default_rng(2).normal(size=64)).astype(np.float32)
    images, texts = np.repeat(vector[None], 33, axis=0), np.repeat(vector[None], 101, axis=0)
    scores = mj.objectives.retrieval_scores(images, texts, np.arange(33), np.arange(101) % 33)
    assert set(scores.values()) == {0.0}


def test_similarities_are_never_all_there(monkeypatch):
    """2000 x 3000 in parts of no more than 100,000."""
    sizes = []
    places = retrieval._places

    def seen(similarity, *groups):
        sizes.append(similarity.size)
        return places(similarity, *groups)

    monkeypatch.setattr(retrieval, "_places", seen)
    monkeypatch.setattr(retrieval, "_SIMILARITIES_AT_A_TIME", 100_000)
    images = np.random.default_rng(3).normal(size=(2000, 2)).astype(np.float32)
    texts = np.random.default_rng(4).normal(size=(3000, 2)).astype(np.float32)
    mj.objectives.retrieval_scores(images, texts, np.arange(2000) % 50, np.arange(3000) % 50)
    assert max(sizes) <= 100_000
    assert sum(sizes) == 2 * 2000 * 3000


@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([1.0, 14.0, 100.0]))
def test_the_loss_equals_its_equation(seed, groups, scale):
    random = np.random.default_rng(seed)
    image, text = unit(random.normal(size=(2, 7, 3))).astype(np.float32)
    group = random.integers(0, groups, 7)
    losses = mj.objectives.contrastive_loss(image, text, group, scale)
    assert losses.shape == (7,)
    np.testing.assert_allclose(losses, loss_by_hand(image, text, group, scale), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(losses, mj.objectives.contrastive_loss(text, image, group, scale), rtol=1e-5, atol=1e-5)


def test_the_loss_in_half_precision_is_that_of_the_same_embeddings_in_float32():
    half = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.bfloat16)
    whole = mj.objectives.contrastive_loss(*half.astype(jnp.float32), np.arange(6), 10.0)
    np.testing.assert_array_equal(mj.objectives.contrastive_loss(*half, np.arange(6), 10.0), whole)


def test_the_loss_of_different_groups_is_that_of_clip():
    random = np.random.default_rng(0)
    image, text = random.normal(size=(2, 6, 4)).astype(np.float32)
    logits, labels = 2.5 * image @ text.T, np.arange(6)
    clip = (mj.cross_entropy(logits, labels).mean() + mj.cross_entropy(logits.T, labels).mean()) / 2
    for group in (labels, 7 - 3 * labels):
        np.testing.assert_allclose(mj.objectives.contrastive_loss(image, text, group, 2.5).mean(), clip, rtol=1e-5)


def test_the_loss_of_a_batch_of_one_group_is_least_where_all_is_alike():
    group = np.zeros(4, np.int32)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    same = jnp.ones((4, 3))
    np.testing.assert_allclose(mj.objectives.contrastive_loss(same, same, group, 3.0), np.full(4, np.log(4)), rtol=1e-6)
    assert mj.objectives.contrastive_loss(image, image, group, 3.0).mean() > np.log(4)


def test_partners_of_a_group_may_change_places():
    image, text = np.random.default_rng(6).normal(size=(2, 5, 3)).astype(np.float32)
    group, order = np.array([0, 1, 0, 1, 2]), np.array([2, 3, 0, 1, 4])
    loss = mj.objectives.contrastive_loss(image, text, group, 2.0).mean()
    np.testing.assert_allclose(mj.objectives.contrastive_loss(image, text[order], group, 2.0).mean(), loss, rtol=1e-6)
    different = mj.objectives.contrastive_loss(image, text[order], np.arange(5), 2.0).mean()
    assert abs(different - mj.objectives.contrastive_loss(image, text, np.arange(5), 2.0).mean()) > 0.1


def test_a_pair_twice_costs_no_less_than_two_in_equal_parts():
    image, group = np.repeat(np.eye(2, dtype=np.float32), 2, axis=0), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(
        mj.objectives.contrastive_loss(image, image, group, 100.0), np.full(4, np.log(2)), rtol=1e-6
    )
    crossed = mj.objectives.contrastive_loss(image, image[::-1], group, 100.0)
    np.testing.assert_allclose(crossed, np.full(4, 100 + np.log(2)), rtol=1e-6)


def test_the_gradient_of_the_scale_is_that_of_differences():
    random = np.random.default_rng(0)
    image, text = (jnp.asarray(unit(random.normal(size=(5, 3))), jnp.float32) for _ in range(2))
    group = jnp.array([0, 1, 1, 2, 0])

    def loss(image, text, scale):
        return mj.objectives.contrastive_loss(image, text, group, scale).mean()

    slope = (loss_by_hand(image, text, group, 2.001) - loss_by_hand(image, text, group, 1.999)).mean() / 0.002
    np.testing.assert_allclose(jax.jit(jax.grad(loss, argnums=2))(image, text, 2.0), slope, rtol=1e-4)


def test_the_loss_function_gives_loss_and_accuracy():
    random = np.random.default_rng(5)
    image, text = random.normal(size=(2, 6, 3)).astype(np.float32)
    group = np.array([0, 1, 1, 2, 0, 3])
    image[0], text[4], image[1], text[2] = 50 * np.eye(3)[[0, 0, 1, 1]]
    outputs = Pair(image, text, jnp.float32(0.1))
    batch = {"image": 0, "tokens": 0, "group": group}
    loss, (_, metrics) = jax.jit(mj.objectives.retrieval_loss(lambda *_, **__: (outputs, {})))(
        {}, {}, batch, jax.random.key(0)
    )
    np.testing.assert_allclose(loss, loss_by_hand(image, text, group, 0.1).mean(), rtol=1e-5)
    right = [group[np.argmax(row)] == group[i] for i, row in enumerate(image @ text.T)]
    assert right[:2] == [True, True]
    assert not all(right)
    assert set(metrics) == {"accuracy"}
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right))


@pytest.mark.parametrize("groups", [None, 4])
def test_evaluation_scores_every_image_and_text(groups):
    data = pairs(groups=groups)
    evaluate = mj.objectives.evaluate_retrieval(embed_images, embed_texts, ks=(1, 3), batch_size=3)
    scores = evaluate({}, {}, data)
    images = {key: row for row, key in enumerate(data["image_id"].tolist())}
    texts = {key: row for row, key in enumerate(data["caption_id"].tolist())}
    # Of each the last row, not the first.
    image_rows, text_rows = list(images.values()), list(texts.values())
    images, texts = data["image"][image_rows], data["tokens"][text_rows]
    similarity = np.asarray(embed_images({}, images, train=False)) @ np.asarray(embed_texts({}, texts, train=False)).T
    image_group, text_group = data["group"][image_rows], data["group"][text_rows]
    for k in (1, 3):
        assert scores[f"image_to_text_recall_{k}"] == recall_by_hand(similarity, image_group, text_group, k)
        assert scores[f"text_to_image_recall_{k}"] == recall_by_hand(similarity.T, text_group, image_group, k)
    assert 0 < scores["mean_recall"] < 1


def test_bad_scores_are_refused():
    square, groups = np.zeros((2, 2)), np.arange(2)
    with pytest.raises(ValueError, match=r"^recall at 3 needs at least 3 candidates, got 2$"):
        mj.objectives.recall_at_k(square, groups, groups, 3)
    with pytest.raises(ValueError, match=r"^k must be a whole number of at least 1, got 0$"):
        mj.objectives.recall_at_k(square, groups, groups, 0)
    shapes = r"^similarity must be \[N, K\], query_group \[N\] and candidate_group \[K\], got shapes "
    with pytest.raises(ValueError, match=shapes + r"\(2, 2\), \(2,\) and \(3,\)$"):
        mj.objectives.recall_at_k(square, groups, np.arange(3), 1)
    with pytest.raises(ValueError, match=shapes + r"\(2,\), \(2,\) and \(\)$"):
        mj.objectives.recall_at_k(np.zeros(2), groups, np.array(0), 1)
    alone = "^every {} needs at least one {} of its group; {} of {} have none, the first is {} {} of group {}$"
    with pytest.raises(ValueError, match=alone.format("query", "candidate", 1, 2, "query", 1, 1)):
        mj.objectives.recall_at_k(square, groups, np.zeros(2), 1)
    with pytest.raises(ValueError, match=r"^there is no query to search with$"):
        mj.objectives.recall_at_k(np.zeros((0, 2)), np.zeros(0), groups, 1)
    with pytest.raises(ValueError, match=r"^recall at 5 needs at least 5 images, got 2$"):
        mj.objectives.retrieval_scores(square, square, groups, groups)
    with pytest.raises(ValueError, match=r"^recall at 3 needs at least 3 texts, got 2$"):
        mj.objectives.retrieval_scores(np.zeros((3, 2)), square, np.arange(3), groups, ks=(1, 3))
    with pytest.raises(ValueError, match=alone.format("image", "text", 2, 3, "image", 1, 7)):
        mj.objectives.retrieval_scores(np.zeros((3, 2)), square, np.array([0, 7, 8]), groups, ks=(1,))
    with pytest.raises(ValueError, match=alone.format("text", "image", 1, 2, "text", 0, 0)):
        mj.objectives.retrieval_scores(square, square, np.ones(2, int), groups, ks=(1,))
    with pytest.raises(
        ValueError, match=r"^embeddings must be \[M, D\] and \[K, D\] .*, got shapes \(\(2, 2\), \(2, 3\)"
    ):
        mj.objectives.retrieval_scores(square, np.zeros((2, 3)), groups, groups)
    with pytest.raises(ValueError, match=r"^every embedding needs one group, got shapes \(\(2, 2\), .*, \(3,\)\)$"):
        mj.objectives.retrieval_scores(square, square, groups, np.arange(3))
    with pytest.raises(ValueError, match=r"^ks must name at least one k, got none$"):
        mj.objectives.retrieval_scores(square, square, groups, groups, ks=())


def test_bad_batches_and_arrays_are_named():
    data = pairs()
    pair = Pair(np.ones((14, 3)), np.ones((14, 3)), 1.0)
    loss_fn = mj.objectives.retrieval_loss(lambda *_, **__: (pair, {}))
    evaluate = mj.objectives.evaluate_retrieval(embed_images, embed_texts, ks=(1,))
    message = r"^image and text must be \[B, D\] and group \[B\], got shapes \(\(14, 3\), \(14, 3\), \(14, 1\)\)$"
    with pytest.raises(ValueError, match=message):
        loss_fn({}, {}, data | {"group": data["group"][:, None]}, jax.random.key(0))
    other = np.where(np.arange(14) == 13, 90, data["group"])
    number, first = data["image_id"][13], list(data["image_id"]).index(data["image_id"][13])
    group = data["group"][13]
    message = rf"^image_id {number} is of group {group} in pair {first}, but of group 90 in pair 13$"
    with pytest.raises(ValueError, match=message):
        evaluate({}, {}, data | {"group": other})
    # What cannot be scored is refused before all is embedded.
    refuses = mj.objectives.evaluate_retrieval(None, None, ks=(1, 8))
    with pytest.raises(ValueError, match=r"^recall at 8 needs at least 8 images, got 7$"):
        refuses({}, {}, data)
