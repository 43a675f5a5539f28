"""ResNets of ImageNet: they give what the equations give for a file by torchvision's names, and go back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.models import ResNet, ResNetStage, from_pytorch, to_pytorch

SIZE, WIDTHS, BLOCKS, CLASSES = 24, (4, 6), (1, 2), 3
KINDS = {"basic": (3, 3), "bottleneck": (1, 3, 1)}  # The windows of a block's convolutions.
IMAGES = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "bottleneck" else pytest.mark.slow) for kind in KINDS]
)


def model_of(kind, classes=CLASSES, stem="pooled_7x7"):
    stages = tuple(map(ResNetStage, WIDTHS, BLOCKS, (1, 2)))
    return ResNet(stages, classes, stem_width=5, bottleneck=kind == "bottleneck", stem=stem)


@functools.cache
def shapes_of(kind, **options):
    return jax.eval_shape(model_of(kind, **options).init, jax.random.key(0), IMAGES)


@functools.cache
def tensors_of(kind):
    """Returns random tensors under torchvision's names, in torch's layout."""
    random, tensors = np.random.default_rng(0), {}

    def add_conv(conv, norm, outputs, inputs, size):
        tensors[f"{conv}.weight"] = random.normal(size=(outputs, inputs, size, size)) / (size * inputs**0.5)
        for name in ("weight", "running_var"):
            tensors[f"{norm}.{name}"] = random.random(outputs) + 0.5
        for name in ("bias", "running_mean"):
            tensors[f"{norm}.{name}"] = 0.3 * random.normal(size=outputs)

    add_conv("conv1", "bn1", 5, 3, 7)
    inputs = 5
    for i, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS, strict=True), start=1):
        for j in range(blocks):
            block, channels = f"layer{i}.{j}", inputs
            outputs = 4 * width if kind == "bottleneck" else width
            for k, size in enumerate(KINDS[kind], start=1):
                to = outputs if k == len(KINDS[kind]) else width
                add_conv(f"{block}.conv{k}", f"{block}.bn{k}", to, channels, size)
                channels = to
            if j == 0:
                add_conv(f"{block}.downsample.0", f"{block}.downsample.1", outputs, inputs, 1)
            inputs = outputs
    tensors["fc.weight"], tensors["fc.bias"] = random.normal(size=(CLASSES, inputs)), random.normal(size=CLASSES)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def windows(x, size, stride, outside):
    """Returns the windows of `x [B, C, H, W]` around every stride-th pixel, `[B, C, H', W', size, size]`."""
    sides = ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2))
    padded = np.pad(x, sides, constant_values=outside)
    return np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]


def reference(tensors, kind, images):
    """Returns the logits by the equations of PyTorch's layers, in float64 and its order of axes."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def conv(x, conv, norm, stride=1):
        kernel = tensors[f"{conv}.weight"]
        x = np.einsum("bcxyhw,ochw->boxy", windows(x, kernel.shape[2], stride, 0), kernel)
        scale, bias, mean, var = (
            tensors[f"{norm}.{name}"][:, None, None] for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(conv(images.transpose(0, 3, 1, 2).astype(np.float64), "conv1", "bn1", 2), 0)
    x = windows(x, 3, 2, -np.inf).max(axis=(4, 5))
    for i, blocks in enumerate(BLOCKS, start=1):
        for j in range(blocks):
            block, y, stride = f"layer{i}.{j}", x, 2 if (i, j) == (2, 0) else 1
            for k, size in enumerate(KINDS[kind], start=1):
                # The stride is that of the first 3x3 convolution.
                first = size == 3 and all(other != 3 for other in KINDS[kind][: k - 1])
                y = conv(y, f"{block}.conv{k}", f"{block}.bn{k}", stride if first else 1)
                y = np.maximum(y, 0) if k < len(KINDS[kind]) else y
            x = conv(x, f"{block}.downsample.0", f"{block}.downsample.1", stride) if j == 0 else x
            x = np.maximum(x + y, 0)
    return x.mean(axis=(2, 3)) @ tensors["fc.weight"].T + tensors["fc.bias"]


def write(folder, tensors):
    mj.save_safetensors(folder / "resnet.safetensors", tensors, overwrite=True)
    return folder / "resnet.safetensors"


@kinds
def test_a_file_gives_what_the_equations_give_and_goes_back(kind, tmp_path):
    tensors = tensors_of(kind)
    counter = {"bn1.num_batches_tracked": np.ones((), np.int64)}
    loaded = from_pytorch(write(tmp_path, {**tensors, **counter}), shapes_of(kind))
    assert (loaded.kept, loaded.left) == ((), tuple(counter))
    found = jax.jit(model_of(kind).apply)(loaded.variables, IMAGES)
    np.testing.assert_allclose(found, reference(tensors, kind, IMAGES), atol=1e-4)
    for library in ("timm", "torchvision", None):
        back = to_pytorch(loaded.variables, library)
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def without(tensors, *parts):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(parts)}


def test_a_last_layer_that_is_not_there_or_of_other_classes_is_kept(tmp_path):
    whole, start = tensors_of("basic"), jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), shapes_of("basic"))
    other = {**whole, "fc.weight": np.ones((4, 6), np.float32), "fc.bias": np.ones(4, np.float32)}
    for tensors, left in ((without(whole, "fc"), ()), (other, ("fc.bias", "fc.weight"))):
        loaded = from_pytorch(write(tmp_path, tensors), start)
        assert (set(loaded.kept), set(loaded.left)) == ({"params/fc/kernel", "params/fc/bias"}, set(left))
        assert float(loaded.variables["params"]["fc"]["kernel"].min()) == 7
        assert float(loaded.variables["params"]["stem"]["kernel"].max()) < 7
        with pytest.raises(ValueError, match=r"fc/kernel in the model's shape, .*: give what model\.init"):
            from_pytorch(write(tmp_path, tensors), shapes_of("basic"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "layer2.1.bn2.running_var"), r"lacks the tensors 'layer2\.1\.bn2\.running_var'; did you"),
        # As timm's deep stems have it.
        (
            lambda t: {**without(t, "conv1"), "conv1.0.weight": t["conv1.weight"]},
            r"lacks the tensors 'conv1\.weight'; did you mean 'conv1\.0\.weight'",
        ),
        (
            lambda t: {**t, "layer1.0.se.fc1.weight": t["fc.weight"]},
            r"has the tensors 'layer1\.0\.se\.fc1\.weight', which are no leaf's of the model",
        ),
        (lambda t: without(t, "fc.bias"), r"lacks the tensors 'fc\.bias'"),
        (lambda t: {**t, "fc.bias": np.ones((), np.float32)}, r"'fc\.bias' of .* is \[\], the model needs \[3\]"),
        (lambda t: {**t, "bn1.bias": t["bn1.bias"].astype(np.int8)}, "is int8, expected floats"),
    ],
)
def test_files_of_other_networks_are_refused(change, message, tmp_path):
    path = write(tmp_path, change(tensors_of("basic")))
    with pytest.raises(ValueError, match=message):
        from_pytorch(path, shapes_of("basic"))


def test_a_network_for_small_images_does_not_take_a_stem_of_imagenet(tmp_path):
    path = write(tmp_path, tensors_of("basic"))
    with pytest.raises(ValueError, match=r"'conv1\.weight' of .* is \[5, 3, 7, 7\], the model needs \[5, 3, 3, 3\]"):
        from_pytorch(path, shapes_of("basic", stem="3x3"))
    with pytest.raises(ValueError, match=r"lacks the tensors 'layer1\.0\.bn3\.running_mean'"):
        from_pytorch(path, shapes_of("bottleneck"))


def test_only_libraries_that_have_it_are_names_for_a_resnet():
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes_of("basic"))
    with pytest.raises(ValueError, match="unknown library 'efficientnet_lite_pytorch'"):
        to_pytorch(variables, "efficientnet_lite_pytorch")


def test_stems_and_widths_are_checked():
    with pytest.raises(ValueError, match="unknown stem '7x7'"):
        shapes_of("basic", stem="7x7")
    with pytest.raises(ValueError, match="width must be a finite number above 0, got 0"):
        mj.models.resnet50_imagenet(width=0)
