"""Agreement of features: the measure, the loss that has it, and the adapter that learns from it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests.helpers import jitted_init


class Net(nn.Module):
    """Two layers with BatchNorm, and an output."""

    width: int

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(self.width, name="first")(x)))
        self.sow("intermediates", "features", x)
        return nn.Dense(3, name="last")(x)


def naive_cka(x, y):
    """Computes it by covariances of features, where the code compares examples."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return np.square(y.T @ x).sum() / np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_cka_against_covariances():
    x, y = draw(12, 3, 4), draw(12, 5, seed=1)
    assert mj.objectives.cka(x, y) == pytest.approx(naive_cka(x, y), rel=1e-4)


def test_cka_knows_no_rotation_scale_or_shift():
    x = draw(10, 6)
    rotation, _ = np.linalg.qr(draw(6, 6, seed=1))
    assert mj.objectives.cka(x, 1e4 * x @ rotation + 3) == pytest.approx(1, abs=1e-4)
    assert mj.objectives.cka(1e8 * x, 1e8 * x) == pytest.approx(1, abs=1e-4)


def test_cka_of_constant_features_is_0_and_has_a_gradient():
    x, constant = draw(6, 4), np.full((6, 4), 7.7, np.float32)  # Whose mean is not 7.7 in float32.
    assert mj.objectives.cka(x, constant) == pytest.approx(0, abs=1e-4)
    assert mj.objectives.cka(constant, 2 * constant) == pytest.approx(0, abs=1e-4)
    assert np.isfinite(jax.jit(jax.grad(mj.objectives.cka))(constant, x)).all()


def models():
    source, target = Net(8), Net(5)
    variables = [jitted_init(net, i, jnp.zeros((2, 4))) for i, net in enumerate((source, target))]
    batch = {"image": draw(16, 4), "label": np.arange(16) % 3}
    return source, target, variables, batch


def drawn(model, layers, **options):
    """The loss of a classifier whose features are drawn to another's."""
    return mj.sum_losses(mj.classification_loss(model.apply), mj.feature_agreement(model.apply, layers, **options))


def split(variables):
    return variables["params"], {"batch_stats": variables["batch_stats"]}


def test_the_loss_is_the_tasks_and_the_disagreement():
    source, target, (of_source, of_target), batch = models()
    teacher = mj.features_teacher(source.apply, ["first", "features"])
    shown = teacher(*split(of_source), batch)
    plain = mj.classification_loss(target.apply)
    loss_fn = drawn(target, ["first", "features"], weight=3.0)
    key = jax.random.key(0)
    loss, (state, metrics) = plain(*split(of_target), batch, key)
    with_it, (same_state, more) = loss_fn(*split(of_target), shown, key)

    def features(net, variables, train):
        _, updates = net.apply(
            variables, batch["image"], train=train, mutable=["intermediates", "batch_stats"], capture_intermediates=True
        )
        sown = updates["intermediates"]
        return sown["first"]["__call__"][0], sown["features"][0]

    pairs = zip(features(source, of_source, False), features(target, of_target, True), strict=True)
    expected = np.mean([naive_cka(*pair) for pair in pairs])
    assert more["agreement"] == pytest.approx(expected, rel=1e-4)
    assert with_it == pytest.approx(float(loss) + 3 * (1 - expected), rel=1e-4)
    assert more["accuracy"] == metrics["accuracy"]
    assert jax.tree.structure(state) == jax.tree.structure(same_state)
    np.testing.assert_array_equal(state["batch_stats"]["norm"]["mean"], same_state["batch_stats"]["norm"]["mean"])


@pytest.mark.slow
def test_the_adapter_learns_from_the_features():
    source, target, (of_source, of_target), batch = models()
    transfer = mj.linear_operator_transfer({"first/kernel": "first/kernel"})
    teacher = mj.features_teacher(source.apply, ["features"])

    def gradient(weight):
        task = mj.Task(drawn(target, ["features"], weight=weight), optax.sgd(0.0))
        state = mj.init_joint_state(
            jax.random.key(0),
            None,
            task,
            transfer,
            source_params=of_source["params"],
            source_state=split(of_source)[1],
            target_params=of_target["params"],
            target_state=split(of_target)[1],
        )
        step = jax.jit(mj.make_joint_step(None, task, transfer, cycle=1, teacher=teacher))
        return step(state, {"target": batch})[1]["adapter/gradient_norm"]

    assert gradient(100.0) > 3 * gradient(0.0)


def test_bad_layers_are_named():
    source, target, (of_source, of_target), batch = models()
    with pytest.raises(ValueError, match=r"no layer 'frist'.*did you mean 'first'"):
        mj.features_teacher(source.apply, ["frist"])(*split(of_source), batch)
    for layers in ([], "first"):
        with pytest.raises(ValueError, match="one or more paths of submodules"):
            mj.feature_agreement(target.apply, layers)
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        mj.feature_agreement(target.apply, ["first"], weight=-1)
    loss_fn = mj.feature_agreement(target.apply, ["first"])
    with pytest.raises(ValueError, match=r"no 'source_features'.*\(features_teacher adds them\)"):
        loss_fn(*split(of_target), batch, jax.random.key(0))
    shown = mj.features_teacher(source.apply, ["first", "features"])(*split(of_source), batch)
    with pytest.raises(ValueError, match="1 layers are to agree with 2 of the source"):
        loss_fn(*split(of_target), shown, jax.random.key(0))
    with pytest.raises(ValueError, match=r"no 'img'.*option `inputs`"):
        mj.features_teacher(source.apply, ["first"], inputs=("img",))(*split(of_source), batch)


@pytest.mark.parametrize("mutable", [False, ["batch_stats"], "batch_stats", []])
def test_features_stand_beside_the_outputs(mutable):
    _, target, (_, of_target), batch = models()
    # BatchNorm can train only where its statistics may change.
    options = {"train": bool(mutable), "mutable": mutable}
    found = mj.objectives.with_features(target.apply, ["first", "features"])(of_target, batch["image"], **options)
    expected = target.apply(of_target, batch["image"], **options)
    if mutable is not False:
        (found, state), (expected, wanted) = found, expected
        jax.tree.map(np.testing.assert_array_equal, state, wanted)
    logits, (first, features) = found
    np.testing.assert_array_equal(logits, expected)
    assert first.shape == features.shape == (16, 5)
    last = of_target["params"]["last"]
    np.testing.assert_allclose(logits, features @ last["kernel"] + last["bias"][None], atol=1e-6)


def test_a_sum_has_the_state_of_its_first_and_the_metrics_of_all():
    def constant(value, **metrics):
        return lambda params, model_state, batch, key: (value * params, ({"seen": value}, metrics))

    loss_fn = mj.sum_losses(constant(1.0, accuracy=0.5), constant(2.0, accuracy=0.1, more=2), constant(3.0, last=3))
    loss, (state, metrics) = loss_fn(10.0, {}, {}, None)
    assert loss == 60
    assert state == {"seen": 1.0}
    assert metrics == {"accuracy": 0.5, "more": 2, "last": 3}


def test_both_are_compared_on_the_same():
    source, target, (of_source, of_target), batch = models()
    key = jax.random.key(0)

    def outcome(compare_on, image):
        loss_fn = drawn(target, ["features"], compare_on=compare_on)
        teacher = mj.features_teacher(source.apply, ["features"], compare_on=compare_on)
        return loss_fn(*split(of_target), teacher(*split(of_source), {**batch, "image": image}), key)

    image = batch["image"]
    _, (state, seen) = outcome(mj.objectives.mixed, image)
    _, (plain_state, plain) = outcome(None, image)
    _, (_, by_hand) = outcome(None, (image + np.roll(image, 1, axis=0)) / 2)
    assert seen["agreement"] == by_hand["agreement"] != plain["agreement"]
    # Labels are learned of the inputs as they are, and so are the statistics.
    assert seen["accuracy"] == plain["accuracy"]
    np.testing.assert_array_equal(state["batch_stats"]["norm"]["mean"], plain_state["batch_stats"]["norm"]["mean"])


def test_pixels_are_mixed_and_tokens_are_not():
    pixels = np.array([[0, 255], [255, 255]], np.uint8)
    np.testing.assert_array_equal(mj.objectives.mixed(pixels), [[127.5, 255], [127.5, 255]])
    tokens = np.array([[3, 4], [5, 6]], np.int32)
    np.testing.assert_array_equal(mj.objectives.mixed(tokens), tokens)
