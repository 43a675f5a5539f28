"""The PyTorch pair of `benchmarks.against_torch` is ours: equal networks, adapter and joint step."""

import copy
import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj

torch = pytest.importorskip("torch")

from benchmarks import against_torch, torch_pair  # noqa: E402

RESNET, MOBILENET = mj.models.resnet50(100), mj.models.mobilenet_v2(100)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads of PyTorch that wait for a core held by another program take far longer than one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_variables(model):
    """Returns parameters and statistics of all kinds at random, such that activations keep their size."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        size = np.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.1
        return size * random.standard_normal(leaf.shape, np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    ("model", "module", "parameters"),
    [
        (RESNET, torch_pair.resnet(RESNET.stages, 100), 23_705_252),
        (MOBILENET, torch_pair.mobilenet_v2(MOBILENET.stages, 100), 2_369_380),
    ],
    ids=["resnet50", "mobilenet_v2"],
)
def test_networks_are_equal(model, module, parameters):
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    variables = random_variables(model)
    torch_pair.load_model(module, variables["params"], variables["batch_stats"])
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3), np.float32)
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_adapters_are_equal():
    """Outputs and gradients; the width of one attention is above the least, and no multiple of the number of heads."""
    random = np.random.default_rng(0)
    target, source, cotangent = (
        random.standard_normal(shape, np.float32) for shape in ((16, 150), (10, 133), (16, 150))
    )
    transfer = mj.published_transfer({"w/weight": "w/weight"}, num_layers=1)
    trees = {"w": {"weight": source}}, {"w": {"weight": target}}
    adapter = jax.jit(transfer.init)(jax.random.key(0), *trees)

    @jax.jit
    def output_and_gradients(adapter):
        output, pullback = jax.vjp(lambda adapter: transfer.apply(adapter, *trees)["w"]["weight"], adapter)
        return output, pullback(cotangent)[0]

    expected, gradients = output_and_gradients(adapter)
    module = torch_pair.Adapter(target.shape, source.shape, num_layers=1)
    arrays = mj.transfers.export_published_adapter(adapter["w/weight"])
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    output = module.eval()(torch.from_numpy(target), torch.from_numpy(source))
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-4)
    output.backward(torch.from_numpy(cotangent))
    arrays = mj.transfers.export_published_adapter(gradients["w/weight"])
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), arrays[name], atol=1e-4, err_msg=name)


def relative_gap(parameters, expected, start):
    """Returns how far apart two sets of parameters are, as a fraction of the way they have come from the start."""
    ours, theirs, start = (torch.cat([p.detach().flatten() for p in group]) for group in (expected, parameters, start))
    return float(torch.linalg.norm(theirs - ours) / torch.linalg.norm(ours - start))


def adapter_weights(module):
    # Softmax is blind to a shift of all keys: their bias has no gradient, and Adam steps along its rounding.
    return [parameter for name, parameter in module.named_parameters() if not name.endswith("fc_k.bias")]


def test_joint_steps_are_equal():
    """Two steps without dropout: one transfers and trains the adapter, one learns alone."""
    problem = against_torch.make_problem(against_torch.Config(nets="small", batch_size=8))
    transfer = mj.lpka_transfer(
        [problem.route],
        max_width=None,
        max_hidden=None,
        output="published",
        attention_dropout=0.0,
        feed_forward_dropout=0.0,
    )
    state, losses = against_torch.make_state(problem, transfer), []
    step = jax.jit(mj.make_joint_step(*against_torch.make_tasks(problem), transfer, cycle=2, update="surrogate"))
    for images, labels in zip(problem.images[:2], problem.labels[:2], strict=True):
        batch = {"image": images, "label": labels.astype(np.int32)}
        state, metrics = step(state, {"source": batch, "target": batch})
        losses.append([float(metrics[f"{role}/loss"]) for role in ("source", "target")])
    start = against_torch.make_torch_modules(problem)
    trained = dataclasses.replace(
        problem,
        variables=tuple({"params": m.params, **m.model_state} for m in (state.source, state.target)),
        adapter=state.adapter.params,
    )
    expected = against_torch.make_torch_modules(trained)

    for channels_last in (False, True):
        modules = copy.deepcopy(start)
        # In evaluation there is no dropout, and no power iteration: its vectors have converged in what was loaded.
        modules[2].eval()
        training = torch_pair.JointTraining(*modules, problem.torch_route, cycle=2, channels_last=channels_last)
        for images, labels, expected_losses in zip(problem.images[:2], problem.labels[:2], losses, strict=True):
            batch = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
            np.testing.assert_allclose([loss.item() for loss in training.step(*batch)], expected_losses, rtol=1e-4)
        for i in range(2):
            assert relative_gap(*(group[i].parameters() for group in (modules, expected, start))) <= 1e-3
        # Adam's first step has one length for all entries, so that rounding turns round those of tiny gradients.
        assert relative_gap(*(adapter_weights(group[2]) for group in (modules, expected, start))) <= 0.1


def test_without_torch_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'PyTorch is not installed: pip install -e "\.\[bench\]"'):
        against_torch.check_torch()
