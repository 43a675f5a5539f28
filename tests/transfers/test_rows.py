"""Rows of embeddings and pixels of patches: which belong together, and what is refused where nothing says it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def table(rows, width, name="embedding"):
    return {"word": {name: normal(rows, width)}}


PATH = "word/embedding"
WORDS = ["the", "cat", "sat", "on", "mats"], ["a", "mats", "the", "dog", "cat", "."]
BY_NAME = mj.Rows.by_name(*WORDS)
SOURCE, TARGET = table(5, 4), table(6, 3)
OWN = np.asarray(TARGET["word"]["embedding"])
# What every transfer that copies makes of it: words of one name by the first three features, all others as they were.
MATCHED = OWN.copy()
for _row, _word in enumerate(WORDS[1]):
    if _word in WORDS[0]:
        MATCHED[_row] = SOURCE["word"]["embedding"][WORDS[0].index(_word), :3]


def route(rows, path=PATH, **options):
    return [mj.Route(path, path, rows=rows, **options)]


def read(params, x):
    """Embeds words and reads their features; nothing reads the words themselves."""
    return params["word"]["embedding"][x] @ params["read"]


def aligned(routes):
    trees = ({**params, "read": normal(width, 2)} for params, width in ((SOURCE, 4), (TARGET, 3)))
    graphs = [mj.channel_graph(read, params, jnp.zeros((2, 3), jnp.int32)) for params in trees]
    return mj.aligned_transfer(routes, *graphs)


FACTORIES = {
    "share": mj.share_transfer,
    "warm": lambda routes: mj.mlp_transfer(routes, num_layers=1, width=4),
    "selection": mj.weight_selection_transfer,
    "operators": mj.linear_operator_transfer,
    "transport": mj.optimal_transport_transfer,
    "aligned": aligned,
}


REFUSING = {
    **FACTORIES,
    "lpka": mj.lpka_transfer,
    "residual": lambda routes: mj.lpka_transfer(routes, output="residual"),
    "generator": mj.parameter_generator_transfer,
    "chained": lambda routes: mj.chain(mj.share_transfer(routes), mj.identity_transfer()),
}


@pytest.mark.parametrize("name", REFUSING)
def test_words_are_not_matched_by_their_number(name):
    transfer = REFUSING[name]({PATH: PATH})
    with pytest.raises(
        ValueError, match=r"^give Route\('word/embedding', .*\) rows=mj.match_vocabulary.* has 6 rows, .* 5, and"
    ):
        transfer.init(jax.random.key(0), SOURCE, TARGET)


# Three of four features, evenly chosen, are the first three.
@pytest.mark.parametrize(
    "name", ["share", pytest.param("warm", marks=pytest.mark.slow), "operators", "selection", "aligned"]
)
def test_words_of_one_name_meet_and_the_others_stay(name):
    transfer = FACTORIES[name](route(BY_NAME))
    adapter = transfer.init(jax.random.key(0), SOURCE, TARGET)
    merged = transfer.apply(adapter, SOURCE, TARGET)["word"]["embedding"]
    np.testing.assert_array_equal(merged, MATCHED)


@pytest.mark.parametrize(("m", "p"), [(6, 4), (4, 6)])
def test_rows_by_number_are_asked_for(m, p):
    """Positions in a text: the first is the first, whatever the longest text is; not evenly chosen ones."""
    source, target = table(p, 3), table(m, 3)
    for factory in (mj.share_transfer, mj.weight_selection_transfer):
        transfer = factory(route("first"))
        merged = transfer.apply({}, source, target)["word"]["embedding"]
        np.testing.assert_array_equal(merged[: min(m, p)], source["word"]["embedding"][: min(m, p)])
        np.testing.assert_array_equal(merged[min(m, p) :], target["word"]["embedding"][min(m, p) :])


@pytest.mark.parametrize("name", ["embedding", "embeddings", "pos_embedding", "weight"])
def test_tables_of_all_libraries_are_known(name):
    trees = [{"word_embeddings": {name: normal(rows, 3)}} for rows in (4, 6)]
    path = f"word_embeddings/{name}"
    with pytest.raises(ValueError, match=r"Rows\.by_name"):
        mj.share_transfer({path: path}).apply({}, *trees)


def test_one_number_of_rows_and_other_leaves_are_as_before():
    source, target = table(4, 5), table(4, 3)
    merged = mj.share_transfer({PATH: PATH}).apply({}, source, target)
    np.testing.assert_array_equal(merged["word"]["embedding"], source["word"]["embedding"][:, :3])
    kernel = mj.share_transfer({PATH: "fc/kernel"}).apply({}, {"fc": {"kernel": normal(3, 9)}}, table(4, 3))
    assert kernel["word"]["embedding"].shape == (4, 3)


@pytest.mark.parametrize(("source", "target"), [((8, 8), (4, 4)), ((2, 3), (5, 4)), ((3, 3), (3, 5))])
def test_grids_are_resampled_as_images_and_the_class_token_stays(source, target):
    def positions(h, w, width):
        return {"position": {"embedding": normal(1 + h * w, width)}}

    trees = positions(*source, 5), positions(*target, 3)
    path = "position/embedding"
    with pytest.raises(ValueError, match=r"rows=mj\.Rows\.from_grids"):
        mj.share_transfer({path: path}).apply({}, *trees)
    transfer = mj.share_transfer(route(mj.Rows.from_grids(source, target, leading=1), path))
    merged = transfer.apply({}, *trees)["position"]["embedding"]
    table = trees[0]["position"]["embedding"][:, :3]
    np.testing.assert_array_equal(merged[0], table[0])
    image = jax.image.resize(table[1:].reshape(*source, 3), (*target, 3), "linear")
    np.testing.assert_allclose(merged[1:], image.reshape(-1, 3), atol=1e-5)


def test_positions_with_an_axis_before_them_have_grids_too():
    source, target = ({"pos_embed": normal(1, rows, 2)} for rows in (16, 4))
    rows = mj.Rows.from_grids((4, 4), (2, 2))
    merged = mj.share_transfer(route(rows, "pos_embed")).apply({}, source, target)["pos_embed"]
    image = jax.image.resize(source["pos_embed"].reshape(4, 4, 2), (2, 2, 2), "linear")
    np.testing.assert_allclose(merged, image.reshape(1, 4, 2), atol=1e-5)


@pytest.mark.parametrize("path", ["patch/kernel", "PatchEmbed_0/Conv_0/kernel", "patch_embeddings/projection/weight"])
def test_patches_of_other_channels_are_refused(path):
    def tree(channels):
        shape = {"patch/kernel": (16 * channels, 3), "PatchEmbed_0/Conv_0/kernel": (4, 4, channels, 3)}
        leaf = normal(*shape.get(path, (3, channels, 4, 4)))
        for part in reversed(path.split("/")):
            leaf = {part: leaf}
        return leaf

    with pytest.raises(
        ValueError, match=rf"^give Route\('{path}', .*rows=mj\.Rows\.from_patches.* pixels, .* no number says"
    ):
        mj.share_transfer({path: path}).apply({}, tree(3), tree(1))
    mj.share_transfer({path: path}).apply({}, tree(3), tree(3))


@pytest.mark.parametrize("layout", ["dense", "flax", "torch"])
@pytest.mark.parametrize(("source", "target"), [((4, 4, 3), (4, 4, 1)), ((2, 2, 1), (4, 4, 3)), ((4, 2, 3), (2, 2, 3))])
def test_a_kernel_of_patches_gives_what_the_sources_gives_on_the_patch_resampled(source, target, layout):
    def kernel(sizes):
        leaf = normal(*sizes, 5)
        if layout == "dense":
            return leaf.reshape(-1, 5), "patch/kernel"
        return (leaf, "patch/kernel") if layout == "flax" else (leaf.transpose(3, 2, 0, 1), "patch/weight")

    (old, path), (start, _) = kernel(source), kernel(target)
    name = path.split("/")[1]
    rows = mj.Rows.from_patches(source, target)
    new = mj.share_transfer(route(rows, path)).apply({}, {"patch": {name: old}}, {"patch": {name: start}})["patch"][
        name
    ]
    assert new.shape == start.shape

    def on(patch, kernel):
        if layout == "torch":
            kernel = kernel.transpose(2, 3, 1, 0)
        return patch.reshape(-1) @ kernel.reshape(-1, 5)

    patch = normal(*target)
    resampled = jax.image.resize(patch, (*source[:2], target[2]), "linear")
    if source[2] != target[2]:
        resampled = jnp.broadcast_to(resampled.mean(axis=2, keepdims=True), source)
    np.testing.assert_allclose(on(patch, new), on(resampled, old), atol=1e-4)


def test_the_first_layer_of_any_network_reads_another_number_of_colours():
    """Nothing tells that its inputs are colours, so that nothing is refused; who knows it, says it."""
    source, target = ({"stem": {"kernel": normal(3, 3, channels, 4)}} for channels in (3, 1))
    rows = mj.Rows.from_patches((3, 3, 3), (3, 3, 1))
    merged = mj.share_transfer(route(rows, "stem/kernel")).apply({}, source, target)["stem"]["kernel"]
    np.testing.assert_allclose(merged, source["stem"]["kernel"].sum(axis=2, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("alike", ["share", "aligned"])
def test_labels_of_a_last_layer_meet_by_name(alike):
    """A kernel's rows are its outputs, a bias's are its entries."""
    labels = ["cat", "dog", "owl"], ["owl", "ant", "cat", "bee"]
    source, target = ({"fc": {"kernel": normal(2, n), "bias": normal(n)}} for n in (3, 4))
    given = route(mj.Rows.by_name(*labels), "fc/*")
    if alike == "share":
        transfer = mj.share_transfer(given)
    else:
        graphs = [
            mj.channel_graph(lambda p, x: x @ p["fc"]["kernel"] + p["fc"]["bias"][None], params, jnp.ones((1, 2)))
            for params in (source, target)
        ]
        transfer = mj.aligned_transfer(given, *graphs)
    merged = transfer.apply(transfer.init(jax.random.key(0), source, target), source, target)["fc"]
    for name in ("kernel", "bias"):
        new, old, start = merged[name], source["fc"][name], target["fc"][name]
        np.testing.assert_array_equal(new, jnp.stack([old[..., 2], start[..., 1], old[..., 0], start[..., 3]], axis=-1))


def test_an_adapter_sees_the_rows_that_are_paired():
    transfer = mj.share_transfer(route(BY_NAME))
    (row,) = transfer.describe(SOURCE, TARGET)
    assert (row.target_matrix, row.source_matrix, row.overlap) == ((6, 3), (3, 4), (3, 3))
    assert row.view == "matrix, rows paired"


def test_a_vision_transformer_takes_positions_and_patches_of_another():
    def model(size, patch, width):
        encoder = mj.models.VisionTransformer(size, patch, width, 1, 2, 8)
        return mj.models.ImageClassifier(encoder, 3)

    large, small = model(8, 2, 8), model(8, 4, 4)
    source, target = (
        jax.tree.map(lambda leaf: normal(*leaf.shape), jax.eval_shape(m.init, jax.random.key(0), images)["params"])
        for m, images in ((large, jnp.zeros((1, 8, 8, 3))), (small, jnp.zeros((1, 8, 8, 1))))
    )
    patch, position = "encoder/patch/kernel", "encoder/position/embedding"
    routes = [
        *route(mj.Rows.from_patches((2, 2, 3), (4, 4, 1)), patch),
        *route(mj.Rows.from_grids((4, 4), (2, 2), leading=1), position),
    ]
    merged = mj.flatten(mj.share_transfer(routes).apply({}, source, target))
    grey = normal(4, 4, 1)
    colours = jnp.broadcast_to(jax.image.resize(grey, (2, 2, 1), "linear"), (2, 2, 3))
    of_source = colours.reshape(-1) @ mj.flatten(source)[patch][:, :4]
    np.testing.assert_allclose(grey.reshape(-1) @ merged[patch], of_source, atol=1e-5)
    np.testing.assert_array_equal(merged[position][0], mj.flatten(source)[position][0, :4])


def test_tokens_of_two_vocabularies_meet_in_padded_tables_too():
    source, target = ["[PAD]", "the", "##s", "##ing"], {"the": 2, "##ing": 1, "[PAD]": 0, "cat": 3}
    rows = mj.match_vocabulary(source, target, source_rows=6, target_rows=8)
    assert (rows.made, rows.counts) == ((0, 1, 2), (8, 6))
    table = {"word": {"embedding": jnp.arange(12.0).reshape(6, 2)}}
    merged = mj.share_transfer([mj.Route(PATH, PATH, rows=rows)]).apply(
        {}, table, {"word": {"embedding": -jnp.ones((8, 2))}}
    )
    expected = [[0, 1], [6, 7], [2, 3], *[[-1, -1]] * 5]
    np.testing.assert_array_equal(merged["word"]["embedding"], expected)
    letters = [chr(number) for number in range(97, 122)]
    assert mj.match_vocabulary([*letters, "Ġ"], letters).made == tuple(range(25))  # There it is a letter as others.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mj.match_vocabulary(["a", "a"], ["a"]), "'a' appears twice among those of the source"),
        (
            lambda: mj.match_vocabulary(["ing", "##ing"], ["ing", "Ġing"]),
            "the source's marks the inside of words by '##', the target's marks their starts by 'Ġ'",
        ),
        (lambda: mj.match_vocabulary(["ing", "▁a"], ["ing"]), "the target's marks neither"),
        (lambda: mj.match_vocabulary(["a", "b"], ["a"], source_rows=1), "source_rows is 1, but the source has 2"),
        (lambda: mj.Rows.by_name(["a", "a"], ["a"]), "'a' appears twice among those of the source"),
        (lambda: mj.Rows.by_name(["a"], ["b"]), "must have a name in common"),
        (lambda: mj.Rows.by_index([0, 3], 3), "those of 3 rows of the source, or -1; got 3"),
        (lambda: mj.Rows.by_index([-1], 3), "got none but -1"),
        (lambda: mj.Rows.by_index([0.5], 3), "must be a row of whole numbers"),
        (lambda: mj.Rows.from_grids((2, 0), (2, 2)), "w of the source must be a whole number of at least 1, got 0"),
        (lambda: mj.Rows.from_grids((2,), (2, 2)), r"sizes of the source must be 2 \(h, w\), got \(2,\)"),
        (lambda: mj.Rows.from_grids((2, 2), (2, 2), leading=-1), "leading must be a whole number of 0 or more"),
        (lambda: mj.Rows.from_patches((2, 2, 3), (2, 2, 4)), "nothing says how 4 channels become 3"),
    ],
)
def test_rows_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (route(mj.Rows.by_index([0, 1], 5)), "give rows of 6 from 5, as many as 'word/embedding'.*not of 2 from 5"),
        ([mj.Route(PATH, ("a/kernel", "a/kernel_2"), rows=BY_NAME)], "routes of one leaf from one leaf"),
        ([mj.Route("conv/kernel", "b/kernel", rows=mj.Rows.from_patches((2, 2, 1), (2, 2, 1)))], "other's layout"),
        ([mj.Route("conv/kernel", "conv/kernel", rows=mj.Rows((0,), (((0, 1.0),),), (4, 4), True))], "make all rows"),
        ([mj.Route("patch/conv/kernel", "patch/kernel", rows="first")], "reshape one of the leaves"),
        ([mj.Route("block", "block", rows="first", view="attention")], "has rows and the view 'attention'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(given, message):
    block = {
        **{name: {"kernel": normal(4, 2, 2)} for name in ("query", "key", "value")},
        "out": {"kernel": normal(2, 2, 4)},
    }
    patch = {"kernel": normal(4, 3), "conv": {"kernel": normal(2, 2, 1, 3)}}
    shared = {"conv": {"kernel": normal(2, 2, 1, 3)}, "patch": patch, "block": block}
    source = {
        **SOURCE,
        "a": {"kernel": normal(3, 2), "kernel_2": normal(3, 2)},
        "b": {"kernel": normal(4, 3)},
        **shared,
    }
    with pytest.raises(ValueError, match=message):
        mj.share_transfer(given).apply({}, source, {**TARGET, **shared})


def test_names_may_be_a_vocabulary_in_any_order():
    """As a tokenizer's get_vocab gives it: numbers by name."""
    listed = mj.Rows.by_name(["the", "cat", "sat"], ["a", "cat", "the"])
    assert mj.Rows.by_name({"sat": 2, "the": 0, "cat": 1}, {"the": 2, "a": 0, "cat": 1}) == listed
    with pytest.raises(ValueError, match="the rows of the source must be numbered 0 to 1, each once"):
        mj.Rows.by_name({"the": 0, "cat": 2}, ["the"])
