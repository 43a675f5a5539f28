import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.objectives.distillation import dkd_loss, nkd_loss, rkd_loss, tf_kd_loss

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.normal(size=(2, 6, 4)) * 3
LABELS = RANDOM.integers(0, 4, 6)
FEATURES, TEACHER_FEATURES = RANDOM.normal(size=(6, 3)), RANDOM.normal(size=(6, 5))
COINCIDENT = FEATURES[[0, 1, 2, 1, 4, 5]]
RKD_GRADIENT = jax.jit(jax.grad(rkd_loss))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    expected = -np.log(softmax(STUDENT)[np.arange(6), LABELS])
    np.testing.assert_allclose(mj.cross_entropy(jnp.array(STUDENT), LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (2.0, 1.0), (3.0, 0.0)])
def test_distillation_equals_its_equation(temperature, weight):
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    divergence = (p * (np.log(p) - np.log(q))).sum(axis=-1)
    hard = -np.log(softmax(STUDENT)[np.arange(6), LABELS])
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    loss = mj.distillation_loss(jnp.array(STUDENT), jnp.array(TEACHER), LABELS, temperature=temperature, weight=weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)


def log_sum_exp(values):
    return np.logaddexp.reduce(np.array(values, np.float64))


def divergence(log_p, log_q):
    return sum(np.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def split(z, y):
    """Logarithms of the probabilities (label, rest), and of those of the rest among themselves."""
    rest = [z[i] for i in range(len(z)) if i != y]
    binary = [z[y] - log_sum_exp(z), log_sum_exp(rest) - log_sum_exp(z)]
    return binary, [value - log_sum_exp(rest) for value in rest]


def dkd(student, teacher, labels, target_weight=1.0, nontarget_weight=8.0, temperature=4.0):
    losses = []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        (b_s, q_s), (b_t, q_t) = split(z_s / temperature, y), split(z_t / temperature, y)
        losses.append(temperature**2 * (target_weight * divergence(b_t, b_s) + nontarget_weight * divergence(q_t, q_s)))
    return np.array(losses)


def nkd(student, teacher, labels, weight=1.5, temperature=1.0):
    losses = []
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        loss = -np.exp(z_t[y] - log_sum_exp(z_t)) * (z_s[y] - log_sum_exp(z_s))
        for log_t, log_s in zip(split(z_t / temperature, y)[1], split(z_s / temperature, y)[1], strict=True):
            loss -= weight * temperature**2 * np.exp(log_t) * log_s
        losses.append(loss)
    return np.array(losses)


def tf_kd(student, labels, temperature=20.0, correct=0.99, weight=0.1, student_temperature=1.0):
    losses = []
    for z, y in zip(student, labels, strict=True):
        u = [(correct if i == y else (1 - correct) / (len(z) - 1)) / temperature for i in range(len(z))]
        log_teacher = [value - log_sum_exp(u) for value in u]
        log_student = z / student_temperature - log_sum_exp(z / student_temperature)
        hard = log_sum_exp(z) - z[y]
        losses.append((1 - weight) * hard + weight * divergence(log_teacher, log_student))
    return np.array(losses)


def huber(error):
    return error**2 / 2 if abs(error) <= 1 else abs(error) - 1 / 2


def relations(x):
    """Relative distances by pair, and cosines of the angle at `i` by triplet; 0 where two examples coincide."""
    n = range(len(x))
    distances = {(i, j): np.sqrt(sum((x[i] - x[j]) ** 2)) for i in n for j in n}
    mean = np.mean([distance for distance in distances.values() if distance > 0])
    cosines = {}
    for i in n:
        for j in n:
            for k in n:
                product = distances[i, j] * distances[i, k]
                cosines[i, j, k] = sum((x[j] - x[i]) * (x[k] - x[i])) / product if product > 0 else 0.0
    return {pair: distance / mean for pair, distance in distances.items()}, cosines


def rkd(student, teacher, distance_weight=25.0, angle_weight=50.0):
    (d_s, a_s), (d_t, a_t) = relations(student), relations(teacher)
    distance = sum(huber(d_s[pair] - d_t[pair]) for pair in d_s) / len(student) ** 2
    angle = sum(huber(a_s[triplet] - a_t[triplet]) for triplet in a_s) / len(student) ** 3
    return distance_weight * distance + angle_weight * angle


@pytest.mark.parametrize("scale", [1, 1e4], ids=["usual", "extreme"])
@pytest.mark.parametrize(
    ("loss", "equation", "options"),
    [
        (dkd_loss, dkd, {}),
        (dkd_loss, dkd, {"target_weight": 2.0, "nontarget_weight": 0.5, "temperature": 1.0}),
        (dkd_loss, dkd, {"target_weight": 0.0, "temperature": 2.0}),
        (dkd_loss, dkd, {"nontarget_weight": 0.0, "temperature": 0.5}),
        (nkd_loss, nkd, {}),
        (nkd_loss, nkd, {"weight": 0.7, "temperature": 3.0}),
        (nkd_loss, nkd, {"weight": 0.0}),
    ],
)
def test_losses_of_logits_equal_their_equations(loss, equation, options, scale):
    student, teacher = STUDENT * scale, TEACHER * scale
    result = loss(jnp.array(student), jnp.array(teacher), LABELS, **options)
    np.testing.assert_allclose(result, equation(student, teacher, LABELS, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 1e4], ids=["usual", "extreme"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "correct": 0.9, "weight": 0.5},
        {"temperature": 40.0, "weight": 0.95, "student_temperature": 40.0},
        {"temperature": 0.05, "correct": 1.0, "weight": 1.0, "student_temperature": 2.0},
        {"correct": 0.25, "weight": 1.0},
        {"weight": 0.0},
    ],
)
def test_the_teacher_free_loss_equals_its_equation(options, scale):
    student = STUDENT * scale
    value, gradient = jax.value_and_grad(lambda z: tf_kd_loss(z, LABELS, **options).sum())(jnp.array(student))
    np.testing.assert_allclose(
        tf_kd_loss(jnp.array(student), LABELS, **options), tf_kd(student, LABELS, **options), rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    if scale == 1:
        expected = differences(lambda z: tf_kd(z, LABELS, **options).sum(), student)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_that_knows_nothing_is_label_smoothing():
    """A uniform teacher: `(1 - w) CE + w (mean of -log p) - w log C`, with the divergence's constant."""
    log_p = np.log(softmax(STUDENT))
    expected = -0.7 * log_p[np.arange(6), LABELS] - 0.3 * (log_p.mean(axis=1) + np.log(4))
    loss = mj.objectives.tf_kd_loss(jnp.array(STUDENT), LABELS, correct=1 / 4, weight=0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_teacher_free_loss_refuses_a_single_class():
    with pytest.raises(ValueError, match=r"^logits must have at least 2 classes"):
        tf_kd_loss(jnp.array(STUDENT[:, :1]), LABELS)


def test_decoupled_parts_sum_to_hinton_distillation():
    """arXiv:2203.08679: `KL(p_T || p_S) = KL(b_T || b_S) + (1 - p_T[y]) KL(q_T || q_S)`."""
    arrays = jnp.array(STUDENT), jnp.array(TEACHER), LABELS
    rest = 1 - softmax(TEACHER / 4)[np.arange(6), LABELS]
    target, nontarget = dkd_loss(*arrays, nontarget_weight=0), dkd_loss(*arrays, target_weight=0, nontarget_weight=1)
    np.testing.assert_allclose(target + rest * nontarget, mj.distillation_loss(*arrays, weight=1.0), rtol=1e-4)


def test_two_classes_leave_one_other_class_and_so_nothing_to_learn_about_it():
    arrays = jnp.array(STUDENT[:, :2]), jnp.array(TEACHER[:, :2]), LABELS % 2
    np.testing.assert_array_equal(dkd_loss(*arrays, target_weight=0), 0)
    np.testing.assert_array_equal(nkd_loss(*arrays, weight=100), nkd_loss(*arrays, weight=0))


@pytest.mark.parametrize("student", [FEATURES, COINCIDENT], ids=["apart", "coincident"])
@pytest.mark.parametrize(
    "options", [{}, {"distance_weight": 2.0, "angle_weight": 0.0}, {"distance_weight": 0.0, "angle_weight": 3.0}]
)
def test_rkd_equals_its_equations(student, options):
    result = rkd_loss(jnp.array(student), jnp.array(TEACHER_FEATURES), **options)
    assert result.shape == ()
    np.testing.assert_allclose(result, rkd(student, TEACHER_FEATURES, **options), rtol=1e-4)


def test_losses_are_zero_where_student_equals_teacher():
    slopes = jax.jit(jax.value_and_grad(lambda z: dkd_loss(z, jnp.array(TEACHER), LABELS).sum()))
    loss, gradient = slopes(jnp.array(TEACHER))
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    features = jnp.array(TEACHER_FEATURES)
    loss, gradient = jax.jit(jax.value_and_grad(rkd_loss))(features, features)
    np.testing.assert_allclose(loss, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_rkd_does_not_see_where_how_large_or_which_way_round():
    rotation = np.linalg.qr(RANDOM.normal(size=(5, 5)))[0]
    moved = 7 * TEACHER_FEATURES @ rotation + 3
    np.testing.assert_allclose(rkd_loss(jnp.array(moved), jnp.array(TEACHER_FEATURES)), 0, atol=1e-5)


def test_the_gradient_of_rkd_keeps_to_the_scale_of_features_also_where_two_coincide():
    """A loss that sees no scale `c` has a gradient of `1 / c`; a slope made up where two coincide would not."""
    large, small = (RKD_GRADIENT(jnp.array(c * COINCIDENT), jnp.array(TEACHER_FEATURES)) for c in [64, 1])
    np.testing.assert_allclose(64 * large, small, rtol=1e-4, atol=1e-5)


def differences(f, x, step=1e-5):
    """The gradient of a scalar function by central differences."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (f(x + shift) - f(x - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize(("loss", "equation"), [(dkd_loss, dkd), (nkd_loss, nkd)])
def test_gradients_of_logits_equal_differences_of_the_equations(loss, equation):
    gradient = jax.grad(lambda z: loss(z, jnp.array(TEACHER), LABELS, temperature=2.0).sum())(jnp.array(STUDENT))
    expected = differences(lambda z: equation(z, TEACHER, LABELS, temperature=2.0).sum(), STUDENT)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_rkd_equals_differences_of_its_equations():
    gradient = RKD_GRADIENT(jnp.array(FEATURES), jnp.array(TEACHER_FEATURES))
    expected = differences(lambda x: rkd(x, TEACHER_FEATURES), FEATURES)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (mj.distillation_loss, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (mj.distillation_loss, {"temperature": float("nan")}, "temperature must be above 0, got nan"),
        (mj.distillation_loss, {"weight": 1.5}, r"weight must lie in \[0, 1\], got 1.5"),
        (dkd_loss, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (dkd_loss, {"target_weight": -1.0}, "target_weight must be finite and at least 0, got -1.0"),
        (dkd_loss, {"nontarget_weight": float("inf")}, "nontarget_weight must be finite and at least 0, got inf"),
        (nkd_loss, {"temperature": -1.0}, "temperature must be above 0, got -1.0"),
        (nkd_loss, {"weight": float("nan")}, "weight must be finite and at least 0, got nan"),
        (tf_kd_loss, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (tf_kd_loss, {"student_temperature": -1.0}, "student_temperature must be above 0, got -1.0"),
        (tf_kd_loss, {"weight": -0.1}, r"weight must lie in \[0, 1\], got -0.1"),
        (tf_kd_loss, {"correct": 0.2}, r"correct must lie in \[1/4, 1\] for 4 classes, got 0.2"),
        (tf_kd_loss, {"correct": 1.1}, r"correct must lie in \[1/4, 1\] for 4 classes, got 1.1"),
    ],
)
def test_bad_options_of_losses_of_logits_are_refused(loss, options, message):
    logits = (jnp.array(STUDENT), jnp.array(TEACHER))[: 1 if loss is tf_kd_loss else 2]
    with pytest.raises(ValueError, match=f"^{message}$"):
        loss(*logits, LABELS, **options)


@pytest.mark.parametrize("loss", [mj.distillation_loss, dkd_loss, nkd_loss])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((6, 4), (6, 5), (6,)), r"logits and teacher_logits must have one shape .*got \(6, 4\) and \(6, 5\)"),
        (((6, 1), (6, 1), (6,)), r"logits must have at least 2 classes .*got shape \(6, 1\)"),
        (((), (), ()), r"logits must have at least 2 classes .*got shape \(\)"),
        (((6, 4), (6, 4), (6, 1)), r"labels of logits \(6, 4\) must have shape \(6,\), got \(6, 1\)"),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(loss, shapes, message):
    logits, teacher_logits, labels = shapes
    with pytest.raises(ValueError, match=message):
        loss(jnp.zeros(logits), jnp.zeros(teacher_logits), jnp.zeros(labels, int))


def test_cross_entropy_refuses_labels_that_would_broadcast():
    for labels in ((6, 1), ()):
        with pytest.raises(ValueError, match=r"labels of logits \(6, 4\) must have shape \(6,\), got \("):
            mj.cross_entropy(jnp.zeros((6, 4)), jnp.zeros(labels, int))


def test_a_label_that_is_no_class_makes_its_loss_nan():
    logits, labels = jnp.zeros((3, 200)), jnp.array([0, -100, 200])  # Optax takes -100 for class 100.
    for loss in (mj.distillation_loss, dkd_loss, nkd_loss):
        np.testing.assert_array_equal(jnp.isnan(loss(logits, logits, labels)), [False, True, True])
    for loss in (mj.cross_entropy, tf_kd_loss):
        np.testing.assert_array_equal(jnp.isnan(loss(logits, labels)), [False, True, True])
    np.testing.assert_allclose(mj.distillation_loss(logits, logits, labels, weight=1.0), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((6, 3), (6, 5)), {"distance_weight": -1.0}, "distance_weight must be finite and at least 0, got -1.0"),
        (((6, 3), (6, 5)), {"angle_weight": float("nan")}, "angle_weight must be finite and at least 0, got nan"),
        (((1, 3), (1, 5)), {}, r"relations need at least 2 examples, got features of shape \(1, 3\)"),
        (((6,), (6, 5)), {}, r"must have shapes \[B, D\] and \[B, E\], got \(6,\) and \(6, 5\)"),
        (((6, 3), (6, 2, 2, 5)), {}, r"must have shapes .*got \(6, 3\) and \(6, 2, 2, 5\)"),
    ],
)
def test_bad_options_and_shapes_of_relations_are_refused(shapes, options, message):
    features, teacher_features = shapes
    with pytest.raises(ValueError, match=message):
        rkd_loss(jnp.zeros(features), jnp.zeros(teacher_features), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_of_half_precision_are_those_of_the_same_logits_in_float32(dtype):
    student, teacher = (jnp.asarray(10 * array, dtype) for array in (STUDENT, TEACHER))
    whole = [array.astype(jnp.float32) for array in (student, teacher)]
    for loss in (mj.distillation_loss, dkd_loss, nkd_loss):
        np.testing.assert_array_equal(loss(student, teacher, LABELS), loss(*whole, LABELS))
    for loss in (mj.cross_entropy, tf_kd_loss):
        np.testing.assert_array_equal(loss(student, LABELS), loss(whole[0], LABELS))
    np.testing.assert_array_equal(rkd_loss(student, teacher), rkd_loss(*whole))
