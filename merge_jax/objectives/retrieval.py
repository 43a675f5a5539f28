"""Scores, loss function and evaluation of models for image-text retrieval in both directions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from merge_jax.checks import check_at_least_one, count_examples
from merge_jax.objectives.device_axis import whole_batch
from merge_jax.objectives.evaluation import apply_in_batches
from merge_jax.objectives.losses import model_loss
from merge_jax.objectives.precision import at_least_float32
from merge_jax.types import Batch, LossFn, ModelApply, ModelState, Params

__all__ = ["contrastive_loss", "evaluate_retrieval", "recall_at_k", "retrieval_loss", "retrieval_scores"]

_SIMILARITIES_AT_A_TIME = 4_000_000
"""Bounds memory use: each entry takes 8 bytes in float64, 4 in float32, and a few single bytes."""


def recall_at_k(similarity: np.ndarray, query_group: np.ndarray, candidate_group: np.ndarray, k: int) -> float:
    """Returns the fraction in [0, 1] of queries with one of their group among their k most similar candidates.

    Among equally similar candidates, those of other groups rank first (our choice). Otherwise the score of a model that
    maps everything to one vector would depend on the order of the set. NaN counts as a tie.

    Args:
      similarity: `[N, K]` of N queries and K candidates.
      query_group: `[N]`.
      candidate_group: `[K]`; any number of candidates may be of a query's group.
      k: in [1, K].

    Raises:
      ValueError: k out of range, shapes that do not fit, no queries, or a query without a candidate of its group.
    """
    similarity = np.asarray(similarity, np.float64)
    query_group, candidate_group = np.asarray(query_group), np.asarray(candidate_group)
    if similarity.shape != (*query_group.shape, *candidate_group.shape) or similarity.ndim != 2:
        raise ValueError(
            "similarity must be [N, K], query_group [N] and candidate_group [K], got shapes"
            f" {similarity.shape}, {query_group.shape} and {candidate_group.shape}"
        )
    _check_groups("query", query_group, "candidate", candidate_group)
    _check_k(k, "candidate", len(candidate_group))
    return float((_places(similarity, query_group, candidate_group) < k).mean())


def retrieval_scores(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    image_group: np.ndarray,
    text_group: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Returns `recall_at_k` in both directions for each k, and their mean, fractions in [0, 1].

    `{"image_to_text_recall_<k>", ..., "text_to_image_recall_<k>", ..., "mean_recall"}`: the fraction of images with
    a text of their group among the k most similar, and the same for texts. Similarities are dot products, the cosines
    of vectors of length 1. They are computed on the host in float64 and then rounded to float32, so that equal vectors
    tie. At most about 60 MB of them are in memory at once.

    Args:
      image_embeddings: `[M, D]`.
      text_embeddings: `[K, D]`.
      image_group: `[M]`.
      text_group: `[K]`.
      ks: the values of k, none above M or K.

    Raises:
      ValueError: a k out of range, shapes that do not fit, or an image or text without a partner of its group.
    """
    images, texts, image_group, text_group = map(
        np.asarray, (image_embeddings, text_embeddings, image_group, text_group)
    )
    shapes = images.shape, texts.shape, image_group.shape, text_group.shape
    if [len(shape) for shape in shapes] != [2, 2, 1, 1] or images.shape[1] != texts.shape[1]:
        raise ValueError(f"embeddings must be [M, D] and [K, D] and groups [M] and [K], got shapes {shapes}")
    if len(images) != len(image_group) or len(texts) != len(text_group):
        raise ValueError(f"every embedding needs one group, got shapes {shapes}")
    if not ks:
        raise ValueError("ks must name at least one k, got none")
    for k in ks:
        _check_k(k, "image", len(images))
        _check_k(k, "text", len(texts))
    sides = {"image": (images, image_group), "text": (texts, text_group)}
    scores = {}
    for one, other in (("image", "text"), ("text", "image")):
        (queries, query_group), (candidates, candidate_group) = sides[one], sides[other]
        _check_groups(one, query_group, other, candidate_group)
        places = _places_of_embeddings(queries, query_group, candidates, candidate_group)
        scores |= {f"{one}_to_{other}_recall_{k}": float((places < k).mean()) for k in ks}
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}


def contrastive_loss(image: jax.Array, text: jax.Array, group: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns the contrastive loss of each pair of an image and a text in a batch, in nats, `[B]`.

    `-sum_j q_ij (log softmax_j(s u_i v_j) + log softmax_j(s u_j v_i)) / 2`, with images `u [B, D]`, texts `v [B, D]`
    and the scale `s`, the inverse of a temperature. `q_ij` is 1 over the number of pairs of i's group if j is one of
    them, else 0. So all pairs within a group count as matches, with equal weight, even if an image is in the batch
    twice. If all groups differ, the mean is CLIP's loss.

    Source: Radford et al., arXiv:2103.00020, section 2.3; the groups are the labels of UniCL, Yang et al.,
    arXiv:2204.03610, section 3.2.

    Raises:
      ValueError: images, texts and groups do not fit.
    """
    shapes = jnp.shape(image), jnp.shape(text), jnp.shape(group)
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"image and text must be [B, D] and group [B], got shapes {shapes}")
    fits = _fits(jnp.asarray(group), jnp.asarray(group))
    share = fits / fits.sum(axis=1, keepdims=True)
    logits = scale * (at_least_float32(image) @ at_least_float32(text).T)
    log_p = jax.nn.log_softmax(logits, axis=1) + jax.nn.log_softmax(logits, axis=0).T
    return -(share * log_p).sum(axis=1) / 2


def retrieval_loss(apply_fn: ModelApply, *, axis_name: str | None = None) -> LossFn:
    """Returns the loss function of a dual encoder: the mean of `contrastive_loss`, in nats.

    Metric `accuracy`: the fraction in [0, 1] of images whose most similar text in the batch is of their group.

    Args:
      apply_fn: `model.apply` of a Linen module called as `(images, tokens, train=True)`. Its result has the attributes
        `image [B, D]`, `text [B, D]` and `scale []`, as in `merge_jax.models.DualEncoder`. Its collections are updated,
        and dropout draws from the step's key. The batch has the entries `image`, `tokens` and `group`, int `[B]`.
      axis_name: that of `make_joint_step`, under `pmap` or `shard_map`; pairs are compared over the whole batch.

    Raises:
      ValueError: while tracing, for a batch that lacks an entry or embeddings that do not fit it.
    """

    def per_example(embeddings: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        image, text, group = whole_batch((embeddings.image, embeddings.text, jnp.asarray(batch["group"])), axis_name)
        losses = contrastive_loss(image, text, group, embeddings.scale)
        best = jnp.argmax(image @ text.T, axis=1)
        return losses, {"accuracy": (group[best] == group).mean()}

    return model_loss(apply_fn, ("image", "tokens"), per_example, needs=("group",))


def evaluate_retrieval(
    embed_images: ModelApply, embed_texts: ModelApply, *, ks: Sequence[int] = (1, 5, 10), batch_size: int = 128
) -> Callable[[Params, ModelState, Mapping[str, Any]], dict[str, float]]:
    """Returns a function `(params, model_state, arrays) -> scores` of `retrieval_scores` over whole sets.

    The arrays hold matching pairs: `image [N, ...]`, in memory or `Streamed`, `tokens [N, L]`, the numbers of both,
    `image_id [N]` and `caption_id [N]`, and `group [N]`. Each image and each text is read and embedded once, even if it
    is in several pairs, and matches all of its group. The last batch is padded and its padding discarded, so one
    compilation suffices. There is no loss, since it would depend on the batching of the pairs.

    Args:
      embed_images: maps images to vectors `[B, D]`, called as `(variables, images, train=False)`; for a Linen module,
        `functools.partial(model.apply, method="embed_images")`.
      embed_texts: the same for tokens.
      ks: as for `retrieval_scores`.
      batch_size: number of images or texts per batch.

    Raises:
      ValueError: a batch size below 1; arrays without a pair or an entry, or with one image or text in several groups;
        or as `retrieval_scores`.
    """
    check_at_least_one(batch_size=batch_size)

    def embedder(apply_fn: ModelApply) -> Callable[..., np.ndarray]:
        jitted = jax.jit(lambda variables, batch: apply_fn(variables, batch, train=False))

        def embed(variables: Any, entry: Any, rows: np.ndarray) -> np.ndarray:
            made = apply_in_batches(lambda batch: jitted(variables, batch["entry"]), {"entry": entry}, rows, batch_size)
            return made.astype(np.float32)

        return embed

    image_embedder, text_embedder = embedder(embed_images), embedder(embed_texts)

    def evaluate(params: Params, model_state: ModelState, arrays: Mapping[str, Any]) -> dict[str, float]:
        if count_examples(arrays, "image", "tokens", "image_id", "caption_id", "group") == 0:
            raise ValueError("cannot evaluate on no pairs")
        group = np.asarray(arrays["group"])
        image_rows, text_rows = _first_rows(arrays, "image_id"), _first_rows(arrays, "caption_id")
        for k in ks:  # Before embedding.
            _check_k(k, "image", len(image_rows))
            _check_k(k, "text", len(text_rows))
        variables = {"params": params, **model_state}
        images = image_embedder(variables, arrays["image"], image_rows)
        texts = text_embedder(variables, arrays["tokens"], text_rows)
        return retrieval_scores(images, texts, group[image_rows], group[text_rows], ks)

    return evaluate


def _places_of_embeddings(
    queries: np.ndarray, query_group: np.ndarray, candidates: np.ndarray, candidate_group: np.ndarray
) -> np.ndarray:
    """Returns the `_places` of embeddings `[N, D]` among `[K, D]`, in chunks of queries."""
    columns = candidates.astype(np.float64).T
    width = max(1, _SIMILARITIES_AT_A_TIME // len(candidates))
    places = []
    for rows in (slice(first, first + width) for first in range(0, len(queries), width)):
        # In float32, a dot product's rounding depends on its place in the matrix, so equal vectors would not tie.
        similarity = (queries[rows].astype(np.float64) @ columns).astype(np.float32)
        places.append(_places(similarity, query_group[rows], candidate_group))
    return np.concatenate(places)


def _places(similarity: np.ndarray, query_group: np.ndarray, candidate_group: np.ndarray) -> np.ndarray:
    """Returns the number of candidates that rank before the most similar one of the query's group, `[N]`."""
    fits = _fits(query_group, candidate_group)
    best = similarity.max(axis=1, keepdims=True, where=fits, initial=-np.inf)
    return (~((similarity < best) | fits)).sum(axis=1)


def _fits(query_group: Any, candidate_group: Any) -> Any:
    """Returns which candidates are of a query's group, `[N, K]`."""
    return query_group[:, None] == candidate_group[None, :]


def _first_rows(arrays: Mapping[str, Any], name: str) -> np.ndarray:
    """Returns the first row of each image, or of each text, in the order of their numbers."""
    group = np.asarray(arrays["group"])
    ids, first, inverse = np.unique(np.asarray(arrays[name]), return_index=True, return_inverse=True)
    wrong = np.flatnonzero(group[first][inverse] != group)
    if wrong.size:
        place, pair = inverse[wrong[0]], wrong[0]
        raise ValueError(
            f"{name} {ids[place]} is of group {group[first[place]]} in pair {first[place]}, but of group {group[pair]}"
            f" in pair {pair}"
        )
    return first


def _check_k(k: int, noun: str, size: int) -> None:
    check_at_least_one(k=k)
    if k > size:
        raise ValueError(f"recall at {k} needs at least {k} {noun}s, got {size}")


def _check_groups(one: str, groups: np.ndarray, other: str, other_groups: np.ndarray) -> None:
    """Raises ValueError unless there are queries, and every one has a candidate of its group."""
    if not groups.size:
        raise ValueError(f"there is no {one} to search with")
    alone = np.flatnonzero(~np.isin(groups, other_groups))
    if alone.size:
        raise ValueError(
            f"every {one} needs at least one {other} of its group; {alone.size} of {groups.size} have none, the first"
            f" is {one} {alone[0]} of group {groups[alone[0]]}"
        )
