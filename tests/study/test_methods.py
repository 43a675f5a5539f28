"""Methods by name: every transfer with every objective, in every experiment."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
import merge_jax.study.methods
from experiments import cross_structure, cross_task, self_transfer
from merge_jax import study
from merge_jax.study.alignment import align

SMOKE = cross_structure.PRESETS["smoke"]


def methods(*names, **options):
    return cross_structure.build(replace(SMOKE, methods=names, **options)).methods


def test_a_method_is_a_transfer_an_objective_or_both():
    found = methods("vanilla", "share", "agree", "share_kd", "linear_operators_kd_agree")
    assert [method.stop > 0 for method in found.values()] == [False, True, False, True, True]
    assert [method.teacher is not None for method in found.values()] == [False, False, True, True, True]


def test_a_teacher_shows_what_each_part_of_an_objective_needs():
    scenario = cross_structure.build(replace(SMOKE, methods=("kd", "agree", "kd_agree", "kd_mixed")))
    params, state = scenario.source.init(jax.random.key(0))
    batch = {"image": jnp.ones((4, 8, 8, 1)), "label": jnp.zeros(4, jnp.int32)}
    shown = {name: set(one.teacher(params, state, batch)) - set(batch) for name, one in scenario.methods.items()}
    assert shown["kd"] == {"teacher_logits"}
    assert shown["agree"] == {"source_features"}
    assert shown["kd_agree"] == {"teacher_logits", "source_features"}
    assert shown["kd_mixed"] == {"mixed_logits"}


@pytest.mark.slow
def test_distillation_on_mixed_images_is_that_of_their_logits():
    scenario = cross_structure.build(replace(SMOKE, methods=("kd_mixed",)))
    method = scenario.methods["kd_mixed"]
    source = scenario.source.init(jax.random.key(0))
    params, state = scenario.target.init(jax.random.key(1))
    image = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    batch = {"image": jnp.asarray(image), "label": jnp.arange(6) % 10}
    loss, _ = method.task.loss_fn(params, state, method.teacher(*source, batch), jax.random.key(0))
    between = (image + np.roll(image, 1, axis=0)) / 2

    def logits(model, params, state, x, train):
        out = model.apply({"params": params, **state}, x, train=train, mutable=["batch_stats"] if train else False)
        return out[0] if train else out

    labelled = mj.cross_entropy(logits(scenario.target, params, state, batch["image"], True), batch["label"])
    student = jax.nn.log_softmax(logits(scenario.target, params, state, between, True) / 4)
    teacher = jax.nn.log_softmax(logits(scenario.source, *source, between, False) / 4)
    divergence = (jnp.exp(teacher) * (teacher - student)).sum(axis=-1)
    assert float(loss) == pytest.approx(float((0.1 * labelled + 0.9 * 16 * divergence).mean()), rel=1e-4)


@pytest.mark.parametrize(("name", "compare_on", "loss", "gradient"), [
    pytest.param("agree", "mixed", 4.849117, 62.116734, marks=pytest.mark.slow),
    ("kd_agree", "mixed", 2.852863, 61.469643),
    pytest.param("agree", "plain", 4.677752, 28.452749, marks=pytest.mark.slow),
    pytest.param("kd_mixed", "mixed", 0.381842, 0.630935, marks=pytest.mark.slow),
    pytest.param("rkd", "mixed", 7.358802, 11.448484, marks=pytest.mark.slow),
])  # fmt: skip
def test_objectives_have_the_values_of_when_they_were_one_pass(name, compare_on, loss, gradient):
    """As commit 50d0ef8 had them, where one wrapped pass gave all that was compared."""
    scenario = cross_structure.build(replace(SMOKE, methods=(name,), compare_on=compare_on))
    method = scenario.methods[name]
    source, (params, state) = (
        model.init(jax.random.key(i)) for i, model in enumerate((scenario.source, scenario.target))
    )
    images = np.random.default_rng(0).uniform(size=(6, 8, 8, 1)).astype(np.float32)
    batch = method.teacher(*source, {"image": jnp.asarray(images), "label": jnp.arange(6) % 10})
    graded = jax.jit(jax.value_and_grad(method.task.loss_fn, has_aux=True))
    (value, (new_state, metrics)), slope = graded(params, state, batch, jax.random.key(2))
    assert float(value) == pytest.approx(loss, rel=1e-4)
    assert float(optax.tree.norm(slope)) == pytest.approx(gradient, rel=1e-3)
    assert float(optax.tree.norm(new_state)) == pytest.approx(11.846394, rel=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx(1 / 6)


def test_aligned_methods_share_one_alignment(monkeypatch):
    made = []
    monkeypatch.setattr(study.methods, "align", lambda *models: made.append(align(*models)) or made[-1])
    config = replace(SMOKE, target_model="small_resnet_half", routes=("**=**",))
    names = ("aligned", "aligned_agree", "mergenet_residual_aligned")
    found = cross_structure.build(replace(config, methods=names)).methods
    assert len(made) == 1
    assert {id(found[name].fit) for name in names[:2]} == {id(made[0].fit)}


@pytest.mark.slow
def test_the_control_itself_reads_the_target_alone():
    found = methods("itself", "no_source")
    scenario = cross_structure.build(replace(SMOKE, methods=("vanilla",)))
    source, target = (role.init(jax.random.key(0))[0] for role in (scenario.source, scenario.target))
    other = jax.tree.map(lambda leaf: leaf + 1, source)
    for method in found.values():
        adapter = method.transfer.init(jax.random.key(0), source, target)
        opened = jax.tree.map(lambda leaf: leaf + 0.1, adapter)  # The gate too.
        first, second = (method.transfer.apply(opened, one, target)["fc"]["kernel"] for one in (source, other))
        np.testing.assert_array_equal(first, second)
        assert (first != target["fc"]["kernel"]).any()


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (cross_structure.build, replace(SMOKE, methods=("agree",), agree=()), "needs layers: --agree target=source"),
        (cross_structure.build, replace(SMOKE, methods=("agre",)), "unknown method 'agre'; did you mean 'agree'"),
        (
            cross_task.build,
            replace(cross_task.PRESETS["smoke"], methods=("share_agree",), source_task=("digits", "parity")),
            "needs one source that is a separate model",
        ),
        (self_transfer.build, replace(self_transfer.PRESETS["smoke"], methods=("agree",)), "needs one source"),
    ],
)
def test_what_cannot_agree_is_told_when_it_is_made(build, config, message):
    with pytest.raises(ValueError, match=message):
        build(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agree": ("stage1_0",)}, "a pair of layers must be target=source, such as stage1_0=stage1_0, got 'stage1_0'"),
        ({"agreement": -1.0}, "agreement must be 0 or more, got -1.0"),
    ],
)
def test_options_of_the_agreement_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMOKE, **options).check()
