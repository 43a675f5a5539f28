"""One table of losses, and what holds for each of them; evaluations have theirs in `test_evaluations.py`."""

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax import objectives
from merge_jax.types import LossFn, TeacherFn

SIZE = 6
ORDER = np.array([3, 0, 5, 1, 4, 2])
ANSWERS = [["yes"] * 2 + ["no"], ["red"], ["no"], ["2", "two"], ["yes"], ["red", "yes"]]
VOCABULARY = ("yes", "no", "red", "2")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BATCH = {
    "image": normal(0, SIZE, 2, 2, 1),
    "tokens": np.random.default_rng(1).integers(0, 9, (SIZE, 4)).astype(np.int32),
    "label": np.array([0, 1, 2, 3, 1, 2], np.int32),
    "start": np.array([0, 1, 2, 3, 0, 2], np.int32),
    "end": np.array([1, 1, 3, 3, 2, 2], np.int32),
    "answers": objectives.answer_indices(ANSWERS, VOCABULARY)[0],
    "example": np.arange(SIZE, dtype=np.int32),
    "group": np.array([0, 1, 1, 2, 0, 3], np.int32),
    "image_id": 100 - np.array([0, 1, 1, 2, 3, 4]),
    "caption_id": 3 * np.arange(SIZE),
}
BATCH["image"][2] = BATCH["image"][1]  # One image of two pairs.


class Net(nn.Module):
    """All its inputs side by side, through BatchNorm and dropout, to outputs `[B, *shape]`."""

    shape: tuple[int, ...] = (4,)
    width: int = 5

    @nn.compact
    def __call__(self, *inputs, train=False):
        x = jnp.concatenate([jnp.asarray(one, jnp.float32).reshape(len(one), -1) for one in inputs], axis=1)
        x = nn.Dense(self.width, use_bias=False, name="first")(x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        # The same for all examples, so that their order does not matter.
        x = nn.Dropout(0.5, broadcast_dims=(0,), deterministic=not train)(x)
        self.sow("intermediates", "features", x)
        return nn.Dense(math.prod(self.shape), name="last")(x).reshape(-1, *self.shape)


class Pair(NamedTuple):
    image: jax.Array
    text: jax.Array
    scale: jax.Array


class Encoders(nn.Module):
    """Images and texts to vectors `[B, 3]`."""

    def setup(self):
        self.image, self.text = Net((3,)), Net((3,))
        self.log_scale = self.param("log_scale", nn.initializers.zeros, ())

    def __call__(self, images, tokens, *, train=False):
        return Pair(self.image(images, train=train), self.text(tokens, train=train), jnp.exp(self.log_scale))


NET, SOURCE, SPANS, ENCODERS = Net(), Net(width=7), Net((4, 2)), Encoders()


def entries(*names):
    return {name: BATCH[name] for name in names}


def variables_of(model, inputs):
    """Returns parameters and state of NumPy's numbers: nothing is compiled for them."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *entries(*inputs).values())
    drawn = jax.tree.map(lambda leaf: normal(math.prod(leaf.shape), *leaf.shape), shapes)
    return drawn["params"], {"batch_stats": jax.tree.map(np.abs, drawn["batch_stats"])}


@dataclass(frozen=True)
class Row:
    """A loss, `(own, state, other, batch, key) -> (losses, (state, metrics))`: `other` teaches and `own` learns."""

    loss: Callable
    own: Any
    other: Any
    batch: dict[str, np.ndarray]
    state: Any = None


def of_arrays(loss, own, other=(), names=()):
    """A row without a model, `(own, other, batch) -> losses`."""
    return Row(lambda own, _, other, batch, key: (loss(own, other, batch), (None, {})), own, other, entries(*names))


def of_logits(loss, *teacher):
    return of_arrays(lambda own, other, batch: loss(own, *other, batch["label"]), LOGITS, teacher, ("label",))


def of_features(objective):
    """Layers of maps and of vectors, narrower and wider than those that teach."""
    own, other = (normal(4, SIZE, 2, 2, 5), normal(5, SIZE, 5)), (normal(6, SIZE, 3), normal(7, SIZE, 2, 7))
    return of_arrays(lambda own, other, _: objective(own, other), own, other)


def of_model(loss_fn, *names, model=NET, inputs=("image",), teacher=None):
    """A row of a model, with a source beside it where that teaches."""
    own, state = variables_of(model, inputs)
    other, other_state = variables_of(SOURCE, ["image"]) if teacher else ((), ())

    def loss(own, state, other, batch, key):
        return loss_fn(own, state, teacher(other, other_state, batch) if teacher else batch, key)

    return Row(loss, own, other, entries(*inputs, *names), state)


def distilled(logits, batch):
    return objectives.distillation_loss(logits, batch["teacher_logits"], batch["label"])


def squares(outputs, batch):
    return jnp.square(outputs[:, 0] - batch["label"]), {"mean": outputs.mean()}


LOGITS, TEACHER, FEATURES, OTHERS = normal(2, SIZE, 4), normal(3, SIZE, 4), normal(4, SIZE, 3), normal(6, SIZE, 5)
CLASSIFICATION, BOTH = objectives.classification_loss(NET.apply), ("image", "tokens")
AGREEMENT = objectives.feature_agreement(NET.apply, ["first", "last"], objective=objectives.redundancy_suppression)
TABLE = {
    "cross entropy": lambda: of_logits(objectives.cross_entropy),
    "distillation": lambda: of_logits(objectives.distillation_loss, TEACHER),
    "dkd": lambda: of_logits(objectives.dkd_loss, TEACHER),
    "nkd": lambda: of_logits(objectives.nkd_loss, TEACHER),
    "tf-kd": lambda: of_logits(objectives.tf_kd_loss),
    "rkd": lambda: of_arrays(lambda own, other, _: objectives.rkd_loss(own, other), FEATURES, OTHERS),
    "cka": lambda: of_arrays(lambda own, *_: objectives.cka(*own), (FEATURES, OTHERS)),
    "contrastive": lambda: of_arrays(
        lambda own, _, batch: objectives.contrastive_loss(*own, batch["group"], 2.0),
        (FEATURES, OTHERS[:, :3]),
        names=("group",),
    ),
    "disagreement": lambda: of_features(objectives.disagreement),
    "redundancy suppression": lambda: of_features(objectives.redundancy_suppression),
    "classification": lambda: of_model(CLASSIFICATION, "label"),
    "a loss of one's own": lambda: of_model(
        objectives.model_loss(NET.apply, ["image"], squares, needs=["label"]), "label"
    ),
    "distilled": lambda: of_model(
        objectives.classification_loss(NET.apply, distilled), "label", teacher=objectives.logits_teacher(SOURCE.apply)
    ),
    "agreement": lambda: of_model(AGREEMENT, teacher=objectives.features_teacher(SOURCE.apply, ["first", "last"])),
    "sum": lambda: of_model(
        objectives.sum_losses(CLASSIFICATION, objectives.feature_agreement(NET.apply, ["features"])),
        *("label",),
        teacher=objectives.features_teacher(SOURCE.apply, ["features"]),
    ),
    "spans": lambda: of_model(objectives.span_loss(SPANS.apply), "start", "end", model=SPANS, inputs=("tokens",)),
    "vqa": lambda: of_model(objectives.vqa_loss(NET.apply), "answers", inputs=BOTH),
    "retrieval": lambda: of_model(objectives.retrieval_loss(ENCODERS.apply), "group", model=ENCODERS, inputs=BOTH),
}
OF_LOGITS, OF_ARRAYS, OF_MODELS = list(TABLE)[:5], list(TABLE)[:10], list(TABLE)[10:]
METRICS = {"a loss of one's own": {"mean"}, "agreement": {"agreement"}, "sum": {"accuracy", "agreement"}}

every_row = pytest.mark.parametrize("name", TABLE)


@functools.cache
def made(name):
    return TABLE[name]()


def by_example(row):
    """Returns what has examples on the leading axis."""
    return {"batch": row.batch} if row.state else {"own": row.own, "other": row.other, "batch": row.batch}


def changed(by, leaf):
    """Returns the examples of those places, or their numbers times a factor."""
    if isinstance(by, float):
        return leaf * np.float32(by) if leaf.dtype == np.float32 else leaf
    return leaf[np.array(by)]


def parts(row, by=1.0, *only):
    """Returns own, other and batch, with a change to what has examples on the leading axis, or only to some of it."""
    found = {"own": row.own, "other": row.other, "batch": row.batch}
    examples = {name: part for name, part in by_example(row).items() if not only or name in only}
    return tuple((found | jax.tree.map(functools.partial(changed, by), examples)).values())


CASES = {
    "as drawn": (),
    "again": (),
    "with another key": (),
    "in another order": (ORDER,),
    "all alike": ([0] * SIZE,),
    "two alike": ([0, 1, 2, 1, 4, 5],),
    "own alike": ([0] * SIZE, "own"),
    "other alike": ([0] * SIZE, "other"),
    "zeros": (0.0,),
    "small": (1e-20,),
    "large": (1e4,),
    "huge": (1e15,),
    "own huge": (1e15, "own"),
    "other huge": (1e15, "other"),
}


@functools.cache
def results(name):
    """Returns of each case losses, state, metrics and the gradients of own and other, by one program for all cases."""
    row = made(name)

    def one(own, other, batch, key):
        def total(own, other):
            losses, (state, metrics) = row.loss(own, row.state, other, batch, key)
            return losses.sum(), (losses, state, metrics)

        (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(own, other)
        return *found, *gradients

    cases = jax.tree.map(lambda *leaves: np.stack(leaves), *(parts(row, *change) for change in CASES.values()))
    keys = jax.random.split(jax.random.key(0))[np.array([int("key" in case) for case in CASES])]
    found = jax.device_get(jax.jit(jax.vmap(one))(*cases, keys))
    return {case: jax.tree.map(lambda leaf, i=i: leaf[i], found) for i, case in enumerate(CASES)}


def trace(row, **changes):
    """Runs the loss on shapes alone."""
    given = {"own": row.own, "state": row.state, "other": row.other, "batch": row.batch} | changes
    jax.eval_shape(row.loss, *given.values(), jax.random.key(0))


def test_every_public_loss_teacher_and_evaluation_has_a_row():
    functions = {name: one for name in objectives.__all__ if inspect.isfunction(one := getattr(objectives, name))}
    returned = {name: inspect.signature(one).return_annotation for name, one in functions.items()}
    losses = {name for name, kind in returned.items() if kind in (jax.Array, LossFn, TeacherFn)} - {"accuracy", "mixed"}
    evaluations = {name for name in functions if name.startswith(("evaluate_", "predict_"))}
    text = "".join(Path(__file__).with_name(f"test_{name}.py").read_text() for name in ("contracts", "evaluations"))
    assert len(losses) >= 18
    assert [name for name in losses | evaluations if not re.search(rf"objectives\.{name}\b", text)] == []


@every_row
def test_constant_and_extreme_examples_have_finite_values_and_gradients(name):
    for case, found in results(name).items():
        for path, leaf in mj.flatten(found).items():
            assert np.isfinite(leaf).all(), (case, path)


@every_row
def test_gradients_reach_every_leaf_that_learns_and_none_that_teaches(name):
    *_, own, other = results(name)["as drawn"]
    still = [path for path, leaf in mj.flatten(own).items() if not np.abs(leaf).max() > 1e-5]
    assert still == (["last/bias"] if name == "agreement" else [])  # Features are compared centred.
    assert not any(leaf.any() for leaf in jax.tree.leaves(other))


@every_row
def test_the_order_of_examples_does_not_matter(name):
    (losses, *rest), (turned, *others) = (results(name)[case][:3] for case in ("as drawn", "in another order"))
    for one, other in ((losses[ORDER] if losses.ndim else losses, turned), (rest, others)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), other, one)


@every_row
def test_what_is_given_stays_as_it_is(name):
    row = made(name)

    def compare(*given):
        before = mj.flatten(given)
        row.loss(*given)
        after = mj.flatten(given)
        assert list(after) == list(before)
        assert all(after[path] is before[path] for path in before)

    jax.eval_shape(compare, row.own, row.state, row.other, row.batch, jax.random.key(0))


@pytest.mark.parametrize("name", OF_ARRAYS)
def test_no_jit_equals_jit_and_writes_into_no_array(name):
    row = made(name)
    own, other, batch = jax.tree.map(np.copy, parts(row))
    for leaf in jax.tree.leaves((own, other, batch)):
        leaf.flags.writeable = False
    losses, _ = row.loss(own, None, other, batch, None)
    np.testing.assert_allclose(losses, results(name)["as drawn"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_key_decides_dropout_statistics_are_trained_and_metrics_have_their_names(name):
    drawn, again, other = (results(name)[case] for case in ("as drawn", "again", "with another key"))
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    loss, state, metrics, *_ = drawn
    assert loss != other[0]
    before, after = mj.flatten(made(name).state), mj.flatten(state)
    assert before.keys() == after.keys()
    assert {np.array_equal(before[path], after[path]) for path in before} == {name == "agreement"}
    assert set(metrics) == METRICS.get(name, {"accuracy"})
    assert 0 <= metrics.get("accuracy", 0) <= 1


@every_row
def test_unlike_numbers_of_examples_are_refused(name):
    row = made(name)
    given = by_example(row)
    for path, fewer in itertools.product(mj.flatten(given), (1, 5)):
        # What becomes of a model's inputs, or in a loss of one's own, is not ours to say.
        if path not in ("batch/image", "batch/tokens") and "own" not in name:
            with pytest.raises(ValueError, match=rf"\b6\b.*\b{fewer}\b|\b{fewer}\b.*\b6\b"):
                trace(row, **mj.replace(given, {path: mj.flatten(given)[path][:fewer]}))


@pytest.mark.parametrize("name", OF_MODELS)
def test_what_a_batch_or_a_state_lacks_is_named(name):
    row = made(name)
    for entry in row.batch:
        with pytest.raises(ValueError, match=f"^the batch has no '{entry}'; "):
            trace(row, batch={other: array for other, array in row.batch.items() if other != entry})
    with pytest.raises(ValueError, match=r"give all .* such as target_state=.*\"batch_stats\".*, got nothing"):
        trace(row, state={})


@pytest.mark.parametrize("name", OF_LOGITS)
def test_losses_of_logits_take_any_leading_axes(name):
    row = made(name)

    @jax.jit
    def reshaped(*given):
        changes = (lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), lambda leaf: leaf[1])
        return [row.loss(own, None, *rest, None)[0] for own, *rest in (jax.tree.map(one, given) for one in changes)]

    losses, *_ = results(name)["as drawn"]
    for found, expected in zip(reshaped(*parts(row)), (losses.reshape(2, 3), losses[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["cka", "disagreement", "redundancy suppression"])
def test_features_of_half_precision_are_compared_in_float32(name):
    row, half = made(name), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parts(made(name)))
    assert jax.eval_shape(lambda own, other, _: row.loss(own, None, other, {}, None)[0], *half).dtype == jnp.float32


def retrieved(own, other, group, axis):
    pair = Pair(own, other[:, :3], 1.0)
    batch = {"image": own, "tokens": other, "group": group}
    return objectives.retrieval_loss(lambda *_, **__: (pair, {}), axis_name=axis)({}, {}, batch, jax.random.key(0))[0]


# Losses that compare examples, of a batch that devices share along an axis.
COMPARING = {
    "agreement on mixed": lambda own, other, _, axis: objectives.disagreement(
        [own], [objectives.mixed(other, axis_name=axis)], axis_name=axis
    ),
    "redundancy suppression": lambda own, other, _, axis: objectives.redundancy_suppression(
        [own], [other], axis_name=axis
    ),
    "rkd": lambda own, other, _, axis: objectives.rkd_loss(*objectives.whole_batch((own, other), axis)),
    "retrieval": retrieved,
}


@pytest.mark.parametrize("name", COMPARING)
def test_devices_that_share_a_batch_have_its_loss_and_in_the_mean_its_gradient(name):
    def loss(scale, own, *others):
        return COMPARING[name](jnp.tanh(scale * own), *others)

    arrays = FEATURES, OTHERS, BATCH["group"]
    halves = [leaf.reshape(2, 3, *leaf.shape[1:]) for leaf in arrays]
    slopes, scale = jax.value_and_grad(loss), normal(8, 1, 3)
    value, gradient = jax.jit(lambda scale: slopes(scale, *arrays, None))(scale)
    on_device = jax.vmap(lambda *given: slopes(scale, *given, "devices"), axis_name="devices")
    values, gradients = jax.jit(on_device)(*halves)
    np.testing.assert_allclose(values, [value, value], rtol=1e-5)
    np.testing.assert_allclose(gradients.mean(axis=0), gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3
