"""Vision transformers of timm, big_vision and vision_transformer: the equations, the way back, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.models import ImageClassifier, from_flax, from_pytorch, to_flax, to_pytorch, vision_transformer_of
from tests.models.common import attend_one, gelu

IMAGE, PATCH, WIDTH, HEADS, LAYERS, HIDDEN, CLASSES = 12, 4, 8, 2, 2, 12, 3
PATCHES = (IMAGE // PATCH) ** 2
IMAGES = np.random.default_rng(1).normal(size=(2, IMAGE, IMAGE, 3)).astype(np.float32)
FLAX = {
    "big_vision": ("pos_embedding", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0"),
    "vision_transformer": (
        "Transformer/posembed_input/pos_embedding",
        "MultiHeadDotProductAttention_1",
        "LayerNorm_2",
        "MlpBlock_3",
    ),
}
LIBRARIES = ("timm", *FLAX)


@functools.cache
def tensors_of(library):
    """Returns random tensors under the names that the library gives them, in its layout."""
    random, tensors = np.random.default_rng(0), {}

    def add(name, *shape, scale=0.5):
        tensors[name] = (scale * random.normal(size=shape)).astype(np.float32)

    def add_dense(name, inputs, outputs):
        if library == "timm":
            add(f"{name}.weight", outputs, inputs)
            add(f"{name}.bias", outputs)
        else:
            add(f"{name}/kernel", inputs, outputs)
            add(f"{name}/bias", outputs)

    def add_norm(name):
        for kind in ("weight", "bias") if library == "timm" else ("scale", "bias"):
            add(f"{name}{'.' if library == 'timm' else '/'}{kind}", WIDTH)

    # So small that the epsilon of the first norm shows.
    small = {"scale": 5e-4}
    if library == "timm":
        add("cls_token", 1, 1, WIDTH, **small)
        add("pos_embed", 1, 1 + PATCHES, WIDTH, **small)
        add("patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH, **small)
        add("patch_embed.proj.bias", WIDTH, **small)
        for i in range(LAYERS):
            add_norm(f"blocks.{i}.norm1")
            add_dense(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
            add_dense(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
            add_norm(f"blocks.{i}.norm2")
            add_dense(f"blocks.{i}.mlp.fc1", WIDTH, HIDDEN)
            add_dense(f"blocks.{i}.mlp.fc2", HIDDEN, WIDTH)
        add_norm("norm")
    else:
        position, attention, norm2, mlp = FLAX[library]
        add("cls", 1, 1, WIDTH, **small)
        add(position, 1, PATCHES + (library != "big_vision"), WIDTH, **small)
        add("embedding/kernel", PATCH, PATCH, 3, WIDTH, **small)
        add("embedding/bias", WIDTH, **small)
        for i in range(LAYERS):
            layer = f"Transformer/encoderblock_{i}"
            add_norm(f"{layer}/LayerNorm_0")
            for part in ("query", "key", "value"):
                add(f"{layer}/{attention}/{part}/kernel", WIDTH, HEADS, WIDTH // HEADS)
                add(f"{layer}/{attention}/{part}/bias", HEADS, WIDTH // HEADS)
            add(f"{layer}/{attention}/out/kernel", HEADS, WIDTH // HEADS, WIDTH)
            add(f"{layer}/{attention}/out/bias", WIDTH)
            add_norm(f"{layer}/{norm2}")
            add_dense(f"{layer}/{mlp}/Dense_0", WIDTH, HIDDEN)
            add_dense(f"{layer}/{mlp}/Dense_1", HIDDEN, WIDTH)
        add_norm("Transformer/encoder_norm")
    add_dense("head", WIDTH, CLASSES)
    return tensors


def approximate_gelu(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def reference(library, image):
    """Returns the logits of one image by the library's equations, in float64 and from its own layout."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors_of(library).items()}
    torch, joint = library == "timm", "." if library == "timm" else "/"

    def dense(name, x):
        kernel = tensors[f"{name}.weight"].T if torch else tensors[f"{name}/kernel"]
        return x @ kernel + tensors[f"{name}{joint}bias"]

    def norm(name, x):
        scale = tensors[f"{name}{joint}{'weight' if torch else 'scale'}"]
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return (x - x.mean(-1, keepdims=True)) / deviation * scale + tensors[f"{name}{joint}bias"]

    corners = [(top, left) for top in range(0, IMAGE, PATCH) for left in range(0, IMAGE, PATCH)]
    patches = np.stack([image[top : top + PATCH, left : left + PATCH] for top, left in corners]).astype(np.float64)
    if torch:
        x = np.einsum("nhwc,ochw->no", patches, tensors["patch_embed.proj.weight"]) + tensors["patch_embed.proj.bias"]
        x = np.concatenate([tensors["cls_token"][0], x]) + tensors["pos_embed"][0]
    else:
        x = np.einsum("nhwc,hwco->no", patches, tensors["embedding/kernel"]) + tensors["embedding/bias"]
        position, attention, norm2, mlp = FLAX[library]
        if library == "big_vision":
            x = np.concatenate([tensors["cls"][0], x + tensors[position][0]])
        else:
            x = np.concatenate([tensors["cls"][0], x]) + tensors[position][0]
    for i in range(LAYERS):
        layer = f"blocks.{i}" if torch else f"Transformer/encoderblock_{i}"
        y = norm(f"{layer}.norm1" if torch else f"{layer}/LayerNorm_0", x)
        if torch:
            # [N, 3, heads, d], as timm reshapes it.
            fused = dense(f"{layer}.attn.qkv", y).reshape(-1, 3, HEADS, WIDTH // HEADS)
            heads = [attend_one(*fused[:, :, head].swapaxes(0, 1)) for head in range(HEADS)]
            x = x + dense(f"{layer}.attn.proj", np.concatenate(heads, axis=-1))
            x = x + dense(f"{layer}.mlp.fc2", gelu(dense(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", x))))
        else:
            block = f"{layer}/{attention}"
            query, key, value = (
                np.einsum("nc,chd->nhd", y, tensors[f"{block}/{part}/kernel"]) + tensors[f"{block}/{part}/bias"]
                for part in ("query", "key", "value")
            )
            heads = np.stack([attend_one(query[:, h], key[:, h], value[:, h]) for h in range(HEADS)])
            x = x + np.einsum("hnd,hdo->no", heads, tensors[f"{block}/out/kernel"]) + tensors[f"{block}/out/bias"]
            y = dense(f"{layer}/{mlp}/Dense_0", norm(f"{layer}/{norm2}", x))
            x = x + dense(f"{layer}/{mlp}/Dense_1", approximate_gelu(y))
    return dense("head", norm("norm" if torch else "Transformer/encoder_norm", x)[0])


def write(folder, tensors, suffix=".safetensors"):
    file = folder / f"vit{suffix}"
    if suffix == ".npz":
        np.savez(file, **tensors)
    else:
        mj.save_safetensors(file, tensors, overwrite=True)
    return file


def reader(library):
    return from_pytorch if library == "timm" else from_flax


def model_of(classes=CLASSES, **options):
    sizes = {"image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    encoder = mj.models.VisionTransformer(**{**sizes, "hidden": HIDDEN, **options})
    return ImageClassifier(encoder, classes) if classes else encoder


def shapes_of(classes=CLASSES, channels=3, **options):
    size = options.get("image_size", IMAGE)
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return jax.eval_shape(model_of(classes, **options).init, jax.random.key(0), images)


@pytest.mark.parametrize(
    ("library", "suffix"), [("timm", ".safetensors"), *((one, ".npz") for one in FLAX), ("big_vision", ".safetensors")]
)
def test_a_file_gives_what_the_equations_of_its_library_give_and_goes_back(library, suffix, tmp_path):
    tensors = tensors_of(library)
    file = write(tmp_path, tensors, suffix)
    encoder = vision_transformer_of(file, num_heads=HEADS if library == "timm" else None)
    approximate = library != "timm"
    assert encoder == model_of(None, epsilon=1e-6, approximate_gelu=approximate)
    loaded = reader(library)(file, shapes_of())
    assert (loaded.kept, loaded.left) == ((), ())
    found = jax.jit(ImageClassifier(encoder, CLASSES).apply)(loaded.variables, IMAGES)
    np.testing.assert_allclose(found, [reference(library, image) for image in IMAGES], atol=2e-5)
    back = to_flax(loaded.variables, library) if library in FLAX else to_pytorch(loaded.variables)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_the_position_of_the_class_token_goes_into_it_for_big_vision(tmp_path):
    variables = from_flax(write(tmp_path, tensors_of("vision_transformer")), shapes_of()).variables
    file = write(tmp_path, to_flax(variables, "big_vision"), ".npz")
    again = from_flax(file, shapes_of()).variables
    apply = jax.jit(model_of().apply)
    assert float(jnp.abs(again["params"]["encoder"]["position"]["embedding"][0]).max()) == 0
    np.testing.assert_allclose(apply(again, IMAGES), apply(variables, IMAGES), rtol=1e-3, atol=1e-3)


def test_names_below_params_are_those_of_a_trained_state(tmp_path):
    tensors = {f"params/{name}": tensor for name, tensor in tensors_of("big_vision").items()}
    file = write(tmp_path, tensors, ".npz")
    assert vision_transformer_of(file).num_layers == LAYERS
    assert from_flax(file, shapes_of()).left == ()


@pytest.mark.parametrize("library", LIBRARIES)
def test_beside_an_encoder_alone_the_layers_after_it_are_left(library, tmp_path):
    joint = "." if library == "timm" else "/"
    rest = ("head", "pre_logits") if library in FLAX else ("head",)
    tensors = {**tensors_of(library), **{f"{name}{joint}bias": np.ones(3, np.float32) for name in rest}}
    loaded = reader(library)(write(tmp_path, tensors), shapes_of(None))
    left = {name for name in tensors if name.startswith(rest)}
    assert (loaded.kept, set(loaded.left)) == ((), left)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_last_layer_of_other_classes_or_none_is_kept(library, tmp_path):
    whole, start = tensors_of(library), jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), shapes_of(5))
    bare = {name: tensor for name, tensor in whole.items() if not name.startswith("head")}
    for tensors in (whole, bare):
        loaded = reader(library)(write(tmp_path, tensors), start)
        assert set(loaded.kept) == {"params/classifier/kernel", "params/classifier/bias"}
        assert set(loaded.left) == tensors.keys() - bare.keys()
        assert float(loaded.variables["params"]["classifier"]["kernel"].min()) == 7


def changed(old, new):
    return lambda t: {name.replace(old, new): tensor for name, tensor in t.items()}


def added(name, *shape):
    return lambda t: {**t, name: np.ones(shape, np.float32)}


def without(part):
    return lambda t: {name: tensor for name, tensor in t.items() if part not in name}


LAYER = "Transformer/encoderblock_0"


@pytest.mark.parametrize(
    ("library", "change", "message"),
    [
        ("timm", without("cls_token"), r"lacks the tensors 'cls_token'; "),
        (
            "timm",
            without("qkv.bias"),
            r"lacks the tensors 'blocks\.0\.attn\.qkv\.bias', 'blocks\.1\.attn\.qkv\.bias'; ",
        ),
        # Pooling by a mean, which timm tells by the name of the last norm.
        (
            "timm",
            lambda t: {f"fc_{name}" if name.startswith("norm") else name: tensor for name, tensor in t.items()},
            r"lacks the tensors 'norm\.bias', 'norm\.weight'; did you mean 'fc_norm\.bias'",
        ),
        ("timm", added("blocks.0.ls1.gamma", WIDTH), r"the tensors 'blocks\.0\.ls1\.gamma', which are no leaf's"),
        ("timm", added("reg_token", 1, 4, WIDTH), r"'reg_token', which are no leaf's of the model"),
        ("timm", added("head.weight", CLASSES, 16), r"'head\.weight' of .* is \[3, 16\], the model needs \[3, 8\]"),
        ("timm", added("blocks.1.attn.qkv.weight", 16, 8), r"is \[16, 8\], the model needs \[24, 8\] for 'params/enc"),
        ("timm", added("patch_embed.proj.weight", WIDTH, 48), r"kernel of patches \[8, 48\], expected \[width, chan"),
        ("timm", added("pos_embed", 10, WIDTH), r"'pos_embed' of .* is \[10, 8\], the model needs \[1, 10, 8\]"),
        ("vision_transformer", added("pre_logits/kernel", WIDTH, 4), "'pre_logits/kernel', which are no leaf's"),
        ("vision_transformer", without("encoder_norm/s"), r"lacks the tensors 'Transformer/encoder_norm/scale'; did"),
        ("big_vision", added("MAPHead_0/probe", 1, 1, WIDTH), "'MAPHead_0/probe', which are no leaf's of the model"),
        ("big_vision", without("cls"), "lacks the tensors 'cls'; "),
        ("big_vision", changed("encoderblock_0", "encoderblock"), f"lacks the tensors '{LAYER}/"),
        (
            "big_vision",
            added(f"{LAYER}/MultiHeadDotProductAttention_0/query/kernel", WIDTH, 4, 2),
            r"query/kernel' of .* is \[8, 4, 2\], the model needs \[8, 2, 4\]",
        ),
        ("big_vision", added("embedding/kernel", 2, 2, 3, WIDTH), "has patches of 2x2 pixels of 3 channels, 12 numb"),
    ],
)
def test_files_of_other_networks_are_refused(library, change, message, tmp_path):
    path = write(tmp_path, change(tensors_of(library)))
    with pytest.raises(ValueError, match=message):
        reader(library)(path, shapes_of())


@pytest.mark.parametrize("library", LIBRARIES)
def test_positions_of_another_grid_are_resized_where_that_is_asked_for_alone(library, tmp_path):
    path, shapes = write(tmp_path, tensors_of(library)), shapes_of(image_size=20)
    with pytest.raises(
        ValueError, match=r"has positions for 9 patches, the model for 25, in images of 20x20 pixels; re"
    ):
        reader(library)(path, shapes)
    loaded = reader(library)(path, shapes, resize_positions=True)
    found = np.asarray(loaded.variables["params"]["encoder"]["position"]["embedding"])
    table = tensors_of(library)["pos_embed" if library == "timm" else FLAX[library][0]][0]
    token, grid = (table[:1], table[1:]) if len(table) == 10 else (np.zeros((1, WIDTH)), table)
    np.testing.assert_array_equal(found[:1], token)
    # Keys' cubic, a = -0.5, along one axis and the other: weights of the 3 old places for each of the 5 new ones.
    weights = np.zeros((5, 3))
    for new in range(5):
        centre = (new + 0.5) * 3 / 5 - 0.5
        for old in range(3):
            d = abs(centre - old)
            near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
            weights[new, old] = near if d <= 1 else far if d < 2 else 0
        weights[new] /= weights[new].sum()
    expected = np.einsum("ai,bj,ijc->abc", weights, weights, grid.reshape(3, 3, WIDTH)).reshape(25, WIDTH)
    np.testing.assert_allclose(found[1:], expected, atol=1e-7)
    assert vision_transformer_of(path, num_heads=HEADS, image_size=20).image_size == 20


def test_a_grid_that_is_no_square_is_not_resized(tmp_path):
    path = write(tmp_path, added("pos_embed", 1, 7, WIDTH)(tensors_of("timm")))
    with pytest.raises(ValueError, match=r"positions for 6 patches, .*they are no squares to resize"):
        from_pytorch(path, shapes_of(), resize_positions=True)


def test_what_no_tensor_tells_has_to_be_given(tmp_path):
    path = write(tmp_path, tensors_of("timm"))
    with pytest.raises(ValueError, match="tells its number of heads: give num_heads"):
        vision_transformer_of(path)
    path = write(tmp_path, tensors_of("big_vision"))
    with pytest.raises(ValueError, match=r"num_heads is 4, .* has 2"):
        vision_transformer_of(path, num_heads=4)
    for tensors in ({"fc.weight": np.ones((2, 2))}, without("cls")(tensors_of("big_vision"))):
        with pytest.raises(ValueError, match="it is of no ViT with a class token of timm, big_vision, vision_trans"):
            vision_transformer_of(write(tmp_path, tensors))


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has the names of timm, .*: from_pytorch reads it"):
        from_flax(write(tmp_path, tensors_of("timm")), shapes_of())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        from_flax(tmp_path / "none.npz", shapes_of())
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"broken\.npz is not a weight file in a supported format "):
        from_flax(tmp_path / "broken.npz", shapes_of())
    objects = {"cls": np.array([{}], dtype=object)}
    with pytest.raises(ValueError, match=r"vit\.npz has Python objects in 'cls', which are pickled"):
        from_flax(write(tmp_path, objects, ".npz"), shapes_of())


def test_variables_of_another_network_are_refused(tmp_path):
    path, other = write(tmp_path, tensors_of("big_vision")), {"params": {"dense": {"kernel": np.ones((2, 3))}}}
    with pytest.raises(ValueError, match="variables are of no vision transformer: they have 'params/dense/kernel'"):
        from_flax(path, other)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes_of())
    with pytest.raises(ValueError, match="the leaf 'params/dense/kernel', which no vision transformer has"):
        to_flax({"params": {**variables["params"], **other["params"]}})
    with pytest.raises(ValueError, match="unknown library 'bigvision'; did you mean 'big_vision'"):
        to_flax(variables, "bigvision")
    with pytest.raises(ValueError, match="unknown library 'torchvision'"):
        to_pytorch(variables, "torchvision")
    with pytest.raises(ValueError, match="patches of 48 numbers are no squares of num_channels 1"):
        to_flax(variables, num_channels=1)
