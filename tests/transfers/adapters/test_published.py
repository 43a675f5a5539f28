"""Parity with the published PyTorch adapter and its training loop, on files of their outputs.

Every .npz of a folder is compared, tests/golden by default or the environment's GOLDEN_DIR. A file with
`output` holds one pass of the adapter, one with `steps` a run of the joint training loop.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import merge_jax as mj
from tests import ROOT

FOLDER = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))


def load(path):
    with np.load(path) as file:
        return {name: file[name] for name in file}


ADAPTER_FILES = [path for path in FILES if "output" in load(path)]
TRAJECTORY_FILES = [path for path in FILES if "steps" in load(path)]


def deviation(ours, theirs, *, skip=lambda path: False):
    """Returns the largest absolute deviation over the leaves of two trees of the same paths."""
    ours, theirs = mj.flatten(ours), mj.flatten(theirs)
    assert ours.keys() == theirs.keys()
    assert all(ours[path].shape == theirs[path].shape for path in ours)
    gaps = [float(np.max(np.abs(np.asarray(ours[path]) - np.asarray(theirs[path])))) for path in ours if not skip(path)]
    return max(gaps, default=0.0)


def report(path, **deviations):
    figures = ", ".join(f"{name} {value:.1e}" for name, value in deviations.items())
    print(f"\n{path.name}: largest deviation: {figures}")


def test_there_are_files_of_both_kinds():
    assert ADAPTER_FILES or TRAJECTORY_FILES, f"no golden files in {FOLDER}"
    assert set(ADAPTER_FILES) | set(TRAJECTORY_FILES) == set(FILES)


@pytest.mark.parametrize(
    "path",
    [
        # What two layers do, one does.
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == "lpka_one_layer" else ())
        for path in ADAPTER_FILES
    ],
)
def test_adapter_output_and_gradients(path):
    golden = load(path)
    official = mj.transfers.load_published_adapter(golden, prefix="state/")
    assert (official.num_layers, official.num_heads) == (golden["layers"], golden["heads"])
    # Dense kernels are [in, out] and matrices [out, in], so each leaf is its matrix transposed.
    source, target = {"w": {"kernel": golden["source"].T}}, {"w": {"kernel": golden["target"].T}}
    transfer = mj.lpka_transfer(
        {"w/kernel": "w/kernel"},
        num_layers=official.num_layers,
        num_heads=official.num_heads,
        output="published",
    )

    @jax.jit
    def output_and_gradients(adapter):
        output, pullback = jax.vjp(lambda adapter: transfer.apply(adapter, source, target)["w"]["kernel"].T, adapter)
        return output, pullback(golden["cotangent"])[0]

    output, gradients = output_and_gradients({"w/kernel": official.params})
    expected = mj.transfers.load_published_adapter(golden, prefix="grad/", num_heads=official.num_heads).params
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))

    output_gap = float(np.abs(output - golden["output"]).max())
    gradient_gap = deviation(gradients["w/kernel"], expected) / largest
    report(path, output=output_gap, gradients=gradient_gap)
    assert output_gap <= 1e-5
    assert gradient_gap <= 1e-5


@pytest.mark.parametrize("path", ADAPTER_FILES, ids=lambda path: path.stem)
def test_an_exported_adapter_is_the_published_state(path):
    """Every array of the state dict, the converged vectors of the spectral norms up to their common sign included."""
    golden = load(path)
    official = mj.transfers.load_published_adapter(golden, prefix="state/", num_heads=int(golden["heads"]))
    arrays = mj.transfers.export_published_adapter(official.params, num_heads=official.num_heads, prefix="state/")
    expected = {name: array for name, array in golden.items() if name.startswith("state/")}
    expected = {name: array for name, array in expected.items() if not name.endswith("effective_weight")}
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.shape == expected[name].shape
        if name.endswith(("_u", "_v")):
            np.testing.assert_allclose(abs(array @ expected[name]), 1, atol=1e-4)
        else:
            np.testing.assert_array_equal(array, expected[name])


def test_only_a_published_form_is_exported():
    trees = {"w": jnp.ones((4, 3))}, {"w": jnp.ones((5, 3))}
    gated = mj.lpka_transfer({"w": "w"}, num_layers=1).init(jax.random.key(0), *trees)["w"]
    with pytest.raises(ValueError, match=r"are target_rows, target_cols, .*; got \['gate', 'proposal'\]"):
        mj.transfers.export_published_adapter(gated)
    fewer = mj.lpka_transfer({"w": "w"}, num_layers=1, output="published", attentions=("rows_rows",))
    with pytest.raises(ValueError, match=r"are target_rows, .*; got \['feed_forward', 'source_rows', 'target_rows'\]"):
        mj.transfers.export_published_adapter(fewer.init(jax.random.key(0), *trees)["w"])


# The two classifiers of the trajectory, `fc(relu(BatchNorm(hidden(x))))`, by their torch names.
_PARAMETERS = {
    "hidden.weight": ("hidden", "kernel"),
    "norm.weight": ("norm", "scale"),
    "norm.bias": ("norm", "bias"),
    "fc.weight": ("fc", "kernel"),
    "fc.bias": ("fc", "bias"),
}


def load_classifier(golden, prefix):
    """Returns the parameters and the running statistics of a classifier."""
    params = {}
    for name, (module, leaf) in _PARAMETERS.items():
        value = golden[f"{prefix}{name}"]
        params.setdefault(module, {})[leaf] = value.T if leaf == "kernel" else value
    statistics = {name: golden[f"{prefix}norm.running_{name}"] for name in ("mean", "var")}
    return params, statistics


def classifier_loss(params, statistics, batch, key):
    """Torch's BatchNorm keeps the unbiased variance in its running statistics, unlike Flax's."""
    del key  # Nothing is random in this model.
    x, y = batch
    hidden = x @ params["hidden"]["kernel"]
    mean, var = hidden.mean(axis=0), hidden.var(axis=0)
    normalised = (hidden - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    out = jax.nn.relu(normalised * params["norm"]["scale"][None] + params["norm"]["bias"][None])
    logits = out @ params["fc"]["kernel"] + params["fc"]["bias"][None]
    unbiased = var * (len(x) / (len(x) - 1))
    new_statistics = {
        "mean": 0.9 * statistics["mean"] + 0.1 * mean,
        "var": 0.9 * statistics["var"] + 0.1 * unbiased,
    }
    return mj.cross_entropy(logits, y).mean(), (new_statistics, {})


def is_key_bias(name):
    """Softmax is blind to a shift of all keys: their gradient is zero, and Adam turns its rounding into steps."""
    return name.endswith(".fc_k.bias")


def is_iteration(name):
    """Vectors of torch's power iteration, which are no parameters."""
    return name.endswith((".0._u", ".0._v"))


@pytest.mark.parametrize("path", TRAJECTORY_FILES, ids=lambda path: path.stem)
def test_joint_trajectory(path):
    golden = load(path)
    official = mj.transfers.load_published_adapter(golden, prefix="init/adapter/")
    transfer = mj.lpka_transfer(
        {"hidden/kernel": "fc/kernel"},
        num_layers=official.num_layers,
        num_heads=official.num_heads,
        output="published",
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
    )
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(float(golden["lr"]), momentum=0.9))
    task = mj.Task(classifier_loss, sgd)
    adapter_optimizer = mj.adapter_adamw(float(golden["adapter_lr"]))
    source, source_statistics = load_classifier(golden, "init/source/")
    target, target_statistics = load_classifier(golden, "init/target/")
    state = mj.init_joint_state(
        jax.random.key(0),
        task,
        task,
        transfer,
        source_params=source,
        target_params=target,
        source_state=source_statistics,
        target_state=target_statistics,
        adapter_optimizer=adapter_optimizer,
    )
    adapter = {"hidden/kernel": jax.tree.map(jnp.asarray, official.params)}
    state = state.replace(adapter=state.adapter.replace(params=adapter))
    step = mj.make_joint_step(
        task,
        task,
        transfer,
        cycle=int(golden["cycle"]),
        update="surrogate",
        adapter_optimizer=adapter_optimizer,
    )
    step = jax.jit(step, donate_argnums=0)

    gaps = dict.fromkeys(("source", "target", "statistics", "losses", "adapter", "key_biases"), 0.0)

    def note(name, value):
        gaps[name] = max(gaps[name], value)

    for i in range(int(golden["steps"])):
        batch = golden["x"][i], golden["y"][i].astype(np.int32)
        state, metrics = step(state, {"source": batch, "target": batch})
        for role, model in (("source", state.source), ("target", state.target)):
            params, statistics = load_classifier(golden, f"step{i + 1}/{role}/")
            note(role, deviation(model.params, params))
            note("statistics", deviation(model.model_state, statistics))
            note("losses", abs(float(metrics[f"{role}/loss"]) - float(golden[f"{role}_loss"][i])))
        # By the published names, since a bias of keys is a part of an array of ours.
        prefix = f"step{i + 1}/adapter/"
        ours = mj.transfers.export_published_adapter(
            state.adapter.params["hidden/kernel"], num_heads=official.num_heads, prefix=prefix
        )
        ours = {name: array for name, array in ours.items() if not is_iteration(name)}
        expected = {name: golden[name] for name in ours}
        note("adapter", deviation(ours, expected, skip=is_key_bias))
        note("key_biases", deviation(ours, expected, skip=lambda name: not is_key_bias(name)))

    report(path, **gaps)
    assert gaps.pop("key_biases") <= 1e-3
    assert max(gaps.values()) <= 2e-5
