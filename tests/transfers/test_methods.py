"""Other methods that move weights between unlike networks, against loops over single numbers."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.transfers.optimal_transport import transport_map


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# A larger source, a smaller one, and one that is larger along one axis only; windows that differ both ways.
LARGE = {"dense": {"kernel": normal(0, 11, 9)}, "conv": {"kernel": normal(1, 3, 3, 7, 8)}, "bias": normal(2, 9)}
SMALL = {"dense": {"kernel": normal(10, 4, 5)}, "conv": {"kernel": normal(11, 1, 3, 3, 4)}, "bias": normal(12, 5)}
MIXED = {"dense": {"kernel": normal(20, 3, 9)}, "conv": {"kernel": normal(21, 5, 1, 9, 2)}, "bias": normal(22, 7)}
TREES = {"down": (LARGE, SMALL), "up": (SMALL, LARGE), "mixed": (MIXED, SMALL)}
ROUTES = {"dense/kernel": "dense/kernel", "conv/kernel": "conv/kernel", "bias": "bias"}
every_pair = pytest.mark.parametrize("pair", [pytest.param("down", marks=pytest.mark.slow), "up", "mixed"])


def as_blocks(leaf):
    """Returns a Flax leaf as `[outputs, inputs, height, width]`."""
    leaf = np.asarray(leaf, np.float64)
    if leaf.ndim == 1:
        return leaf[None, :, None, None]
    return np.moveaxis(leaf if leaf.ndim == 4 else leaf[None, None], (3, 2), (0, 1))


def assert_leaf(leaf, blocks, **tolerance):
    np.testing.assert_allclose(as_blocks(leaf), blocks, **tolerance)


def partner_tap(t, target_size, source_size):
    """Returns the source's tap at the target's tap `t`, centres aligned, or None where the source has none."""
    size = min(target_size, source_size)
    s = t - (target_size - size) // 2
    return s + (source_size - size) // 2 if 0 <= s < size else None


def on_window(source, target):
    """Returns source blocks on the target's window, zeros where the source has no tap."""
    height, width = target.shape[2:]
    aligned = np.zeros((*source.shape[:2], height, width))
    for y in range(height):
        for x in range(width):
            taps = partner_tap(y, height, source.shape[2]), partner_tap(x, width, source.shape[3])
            if None not in taps:
                aligned[:, :, y, x] = source[:, :, taps[0], taps[1]]
    return aligned


def selected(source, target):
    new = target.copy()
    (m, n, height, width), (p, q, *window) = target.shape, source.shape
    rows, inputs = min(m, p), min(n, q)
    for i in range(rows):
        for j in range(inputs):
            for y in range(height):
                for x in range(width):
                    taps = partner_tap(y, height, window[0]), partner_tap(x, width, window[1])
                    if None not in taps:
                        new[i, j, y, x] = source[int(i * p / rows), int(j * q / inputs), taps[0], taps[1]]
    return new


@every_pair
def test_weight_selection_is_its_loop(pair):
    source, target = TREES[pair]
    merged = mj.weight_selection_transfer(ROUTES).apply({}, source, target)
    for path, leaf in mj.flatten(merged).items():
        expected = selected(as_blocks(mj.flatten(source)[path]), as_blocks(mj.flatten(target)[path]))
        assert_leaf(leaf, expected, rtol=0)


def test_weight_selection_spans_the_source_and_of_equal_shapes_copies():
    source, target = {"w": {"kernel": jnp.arange(12.0).reshape(2, 6)}}, {"w": {"kernel": jnp.zeros((1, 3))}}
    transfer = mj.weight_selection_transfer({"w/kernel": "w/kernel"})
    np.testing.assert_array_equal(transfer.apply({}, source, target)["w"]["kernel"], [[0, 2, 4]])
    copied = mj.weight_selection_transfer(ROUTES).apply({}, LARGE, jax.tree.map(jnp.zeros_like, LARGE))
    chex.assert_trees_all_equal(copied, LARGE)


@every_pair
def test_linear_operators_start_as_sharing_or_selection(pair):
    source, target = TREES[pair]
    for start, other in (("overlap", mj.share_transfer), ("selection", mj.weight_selection_transfer)):
        transfer = mj.linear_operator_transfer(ROUTES, start=start)
        adapter = transfer.init(jax.random.key(0), source, target)
        merged = jax.jit(transfer.apply)(adapter, source, target)
        chex.assert_trees_all_equal(merged, other(ROUTES).apply({}, source, target))


@every_pair
def test_linear_operators_are_their_loop(pair):
    source, target = TREES[pair]
    transfer = mj.linear_operator_transfer(ROUTES)
    adapter = transfer.init(jax.random.key(0), source, target)
    leaves, structure = jax.tree.flatten(adapter)
    adapter = structure.unflatten([normal(30 + i, *leaf.shape) for i, leaf in enumerate(leaves)])
    merged = transfer.apply(adapter, source, target)
    for path, leaf in mj.flatten(merged).items():
        old, given = as_blocks(mj.flatten(target)[path]), as_blocks(mj.flatten(source)[path])
        aligned = on_window(given, old)
        outputs, inputs = adapter[path]["outputs"], adapter[path]["inputs"]
        # Nothing of the target is left where the source has an entry.
        kept = selected(np.zeros_like(given), old)
        for y, x in np.ndindex(old.shape[2:]):
            kept[:, :, y, x] += np.asarray(outputs, float) @ aligned[:, :, y, x] @ np.asarray(inputs, float)
        assert_leaf(leaf, kept, atol=1e-4)


@every_pair
def test_gradients_reach_all_of_the_operators(pair):
    """Rows and columns that make no part of the overlap learn too: so it grows."""
    source, target = TREES[pair]
    transfer = mj.linear_operator_transfer(ROUTES)

    def loss(adapter):
        leaves = jax.tree.leaves(transfer.apply(adapter, source, target))
        return sum(jnp.sum((leaf - normal(40 + i, *leaf.shape)) ** 2) for i, leaf in enumerate(leaves))

    gradient = jax.jit(jax.grad(loss))(transfer.init(jax.random.key(0), source, target))
    assert set(mj.flatten(gradient)) == {f"{path}/{name}" for path in ROUTES for name in ("outputs", "inputs")}
    reached = gradient["dense/kernel"]
    assert (np.abs(reached["outputs"]) > 0).all(axis=1).all()
    assert (np.abs(reached["inputs"]) > 0).all(axis=0).all()


def test_shared_operators_are_one_pair_and_stacked_ones_are_each_ones_own():
    source, target = ({f"{i}": {"kernel": normal(seed + i, *shape)} for i in range(3)}
                      for seed, shape in ((50, (5, 4)), (60, (3, 6))))  # fmt: skip
    routes = {"*/kernel": "*/kernel"}
    shared, own = (mj.linear_operator_transfer(routes, shared=shared) for shared in (True, False))
    pair = {"outputs": normal(70, 6, 4), "inputs": normal(71, 5, 3)}
    stacked = {name: jnp.stack([leaf, 2 * leaf, 3 * leaf]) for name, leaf in pair.items()}
    merged = shared.apply({"0/kernel": pair}, source, target)
    scaled = own.apply({"0/kernel": stacked}, source, target)
    blank = jax.tree.map(jnp.zeros_like, target)
    for i in range(3):
        made = shared.apply({"0/kernel": pair}, source, blank)[f"{i}"]["kernel"]
        rest = merged[f"{i}"]["kernel"] - made
        np.testing.assert_allclose(scaled[f"{i}"]["kernel"], rest + (i + 1) ** 2 * made, rtol=1e-4, atol=1e-4)
    assert own.init(jax.random.key(0), source, target)["0/kernel"]["outputs"].shape == (3, 6, 4)
    assert [row.parameters for row in shared.describe(source, target)] == [39, 0, 0]
    assert [row.parameters for row in own.describe(source, target)] == [39, 39, 39]
    # The cheaper order of the two products is `A (S B)`.
    assert own.describe(source, target)[0].flops == 2 * 4 * 5 * 3 + 2 * 6 * 4 * 3


def test_an_adapter_of_other_operators_is_refused():
    transfer = mj.linear_operator_transfer({"bias": "bias"})
    with pytest.raises(ValueError, match=r"no entry for the route to 'bias'.*there is 'dense/kernel'"):
        transfer.apply({"dense/kernel": {}}, LARGE, SMALL)
    with pytest.raises(ValueError, match=r"'bias' does not fit.*Expected inputs of \(9, 5\), got \("):
        transfer.apply(transfer.init(jax.random.key(0), MIXED, SMALL), LARGE, SMALL)


def test_the_parameter_generator_is_its_equation():
    sources = {f"{i}": {"kernel": normal(80 + i, 7, 5)} for i in range(2)}
    target = {"w": {"kernel": normal(85, 4, 6)}}
    transfer = mj.parameter_generator_transfer({"w/kernel": "*/kernel"})
    adapter = transfer.init(jax.random.key(0), sources, target)
    with jax.enable_x64(True):
        drawn = jax.eval_shape(transfer.init, jax.random.key(0), sources, target)
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype("float32")}
    ((name, params),) = adapter.items()
    assert {p: leaf.shape for p, leaf in params.items()} == {
        "rows": (6, 10), "columns": (7, 4), "scale": (6, 4), "shift": (6, 4)}  # fmt: skip
    assert (params["scale"] == 1).all()
    assert not params["shift"].any()
    np.testing.assert_allclose(np.std(params["rows"]), np.sqrt(2 / 16), rtol=0.3)
    # The paper's form: one map of rows and of columns for both layers, which are then mixed, here by 0.3 and -0.8.
    rows, columns, scale, shift = normal(90, 6, 5), normal(91, 7, 4), normal(92, 6, 4), normal(93, 6, 4)
    params = {"rows": jnp.concatenate([0.3 * rows, -0.8 * rows], 1), "columns": columns, "scale": scale, "shift": shift}
    made = transfer.apply({name: params}, sources, target)["w"]["kernel"]
    mixed, rows_of, columns_of = np.zeros((6, 4)), np.asarray(rows), np.asarray(columns)
    for weight, one in zip((0.3, -0.8), sources.values(), strict=True):
        given = np.asarray(one["kernel"])
        for i, j, p, q in np.ndindex(6, 4, 5, 7):
            mixed[i, j] += weight * rows_of[i, p] * given[q, p] * columns_of[q, j]
    np.testing.assert_allclose(made, (scale * np.tanh(mixed) + shift).T, atol=1e-5)
    other = transfer.apply({name: params}, sources, jax.tree.map(jnp.zeros_like, target))["w"]["kernel"]
    np.testing.assert_array_equal(made, other)


def plain_sinkhorn(target, source, regularisation, iterations):
    """Scaling of rows and columns by turns, in double precision."""
    unit = (target**2).sum(1).mean() + (source**2).sum(1).mean()
    kernel = np.zeros((len(target), len(source)))
    for i, k in np.ndindex(kernel.shape):
        kernel[i, k] = np.exp(-np.sum((target[i] - source[k]) ** 2) / unit / regularisation)
    v = np.ones(len(source))
    for _ in range(iterations):
        u = 1 / len(target) / (kernel @ v)
        v = 1 / len(source) / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    return plan / plan.sum(1, keepdims=True)


@pytest.mark.parametrize(("m", "p"), [(4, 7), (7, 4), (1, 3)])
def test_the_transport_map_is_plain_sinkhorn(m, p):
    target, source = normal(100, m, 6), normal(101, p, 6)
    for iterations in (1, 200):
        found = transport_map(target, source, regularisation=0.3, iterations=iterations)
        expected = plain_sinkhorn(np.asarray(target, float), np.asarray(source, float), 0.3, iterations)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(0), m / p, rtol=1e-4)


def test_the_transport_map_is_one_of_directions_and_the_best_assignment_at_little_regularisation():
    target = normal(102, 4, 3)
    source = target[jnp.array([2, 0, 3, 1])] + 0.1 * normal(103, 4, 3)
    small, large = (transport_map(target * s, source * s, regularisation=0.01, iterations=50) for s in (1e-3, 1e3))
    np.testing.assert_allclose(small, large, atol=1e-4)
    np.testing.assert_array_equal(jnp.argmax(small, axis=1), [1, 3, 0, 2])


def fused_by_loops(routes, source, target, regularisation, weight):
    """Layer by layer; returns the new blocks of each route."""
    previous, new = None, {}
    for path, of_source in routes.items():
        old, given = as_blocks(mj.flatten(target)[path]), as_blocks(mj.flatten(source)[of_source])
        given = on_window(given, old)
        (m, n, *window), (p, q) = old.shape, given.shape[:2]
        fits = previous is not None and previous.shape == (n, q)
        inputs = np.eye(n, q) if not fits else previous
        aligned, known = np.zeros((p, n, *window)), np.zeros((n, *window))
        taps = on_window(np.ones((1, 1, *as_blocks(mj.flatten(source)[of_source]).shape[2:])), old)[0, 0]
        for j in range(n):
            known[j] = taps if fits or j < q else 0
            for k in range(q):
                aligned[:, j] += inputs[j, k] * given[:, k]
        plan = plain_sinkhorn((old * known).reshape(m, -1), aligned.reshape(p, -1), regularisation, 100)
        moved = np.zeros_like(old)
        for i, k in np.ndindex(plan.shape):
            moved[i] += plan[i, k] * aligned[k]
        new[path] = old + weight * known * (moved - old)
        previous = plan if mj.flatten(target)[path].ndim > 1 else previous
    return new


def layers(seed, widths):
    tree = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        window = (3, 3) if i < 1 else ()
        tree[f"layer_{i}"] = {
            "kernel": normal(seed + i, *window, inputs, outputs),
            "bias": normal(seed + 5 + i, outputs),
        }
    return tree


IN_ORDER = {f"layer_{i}/{name}": f"layer_{i}/{name}" for i in range(3) for name in ("kernel", "bias")}


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(3, 6, 5, 4), (3, 9, 7, 4), (4, 3, 8, 6), (2, 5, 4, 3)])
def test_transport_is_its_loop(widths):
    source, target = layers(110, widths), layers(120, (3, 6, 5, 4))
    transfer = mj.optimal_transport_transfer(IN_ORDER, regularisation=0.2, weight=0.3)
    merged = mj.flatten(jax.jit(transfer.apply)({}, source, target))
    for path, blocks in fused_by_loops(IN_ORDER, source, target, 0.2, 0.3).items():
        assert_leaf(merged[path], blocks, atol=1e-4)


def test_transport_without_a_fitting_route_before_keeps_what_only_the_target_has():
    source, target = layers(130, (2, 4, 3, 2)), layers(140, (3, 6, 5, 4))
    routes = {"layer_1/kernel": "layer_2/kernel", "layer_0/kernel": "layer_0/kernel", "layer_0/bias": "layer_1/bias"}
    transfer = mj.optimal_transport_transfer(routes, regularisation=0.2, weight=1.0)
    merged = mj.flatten(jax.jit(transfer.apply)({}, source, target))
    for path, blocks in fused_by_loops(routes, source, target, 0.2, 1.0).items():
        assert_leaf(merged[path], blocks, atol=1e-4)
    # The source's images have 2 channels, its layer 2 has 3 inputs, its bias 3 entries.
    np.testing.assert_array_equal(merged["layer_0/kernel"][:, :, 2], target["layer_0"]["kernel"][:, :, 2])
    np.testing.assert_array_equal(merged["layer_1/kernel"][3:], target["layer_1"]["kernel"][3:])
    np.testing.assert_array_equal(merged["layer_0/bias"][3:], target["layer_0"]["bias"][3:])


def permuted(tree, seed):
    """Returns the same network with the neurons of all three layers in another order."""
    random, new, before = np.random.default_rng(seed), {}, np.arange(3)
    for name, layer in tree.items():
        order = random.permutation(len(layer["bias"]))
        assert (order != np.arange(len(order))).any()
        new[name] = {"kernel": layer["kernel"][..., before, :][..., order], "bias": layer["bias"][order]}
        before = order
    return new


def test_transport_undoes_a_permutation_of_neurons():
    target = layers(150, (3, 12, 10, 8))
    source = permuted(target, 0)
    merged = jax.jit(mj.optimal_transport_transfer(IN_ORDER, weight=1.0).apply)({}, source, target)
    chex.assert_trees_all_close(merged, target, atol=1e-3)
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, source, target)
    assert np.abs(averaged["layer_2"]["kernel"] - target["layer_2"]["kernel"]).max() > 0.5


def test_transport_of_weight_nothing_is_the_target_and_each_weight_lies_between():
    source, target = layers(160, (3, 7, 5, 4)), layers(170, (3, 6, 5, 4))
    routes = dict(itertools.islice(IN_ORDER.items(), 2))
    none, half, all_ = (
        jax.jit(mj.optimal_transport_transfer(routes, weight=weight).apply)({}, source, target)
        for weight in (0.0, 0.5, 1.0)
    )
    chex.assert_trees_all_equal(none, target)
    chex.assert_trees_all_close(half, jax.tree.map(lambda a, b: (a + b) / 2, target, all_), atol=1e-6)


@pytest.mark.slow
def test_transport_has_the_derivative_that_differences_have():
    """Of both models, through the plan: the first layer moves the second by its map alone."""
    source, target = layers(180, (3, 6, 5, 4)), layers(190, (3, 6, 5, 4))
    transfer = mj.optimal_transport_transfer(IN_ORDER, regularisation=0.3, iterations=20)

    @functools.partial(jax.jit, static_argnames="name")
    def value(step, name):
        moved = {"source": source, "target": target}
        first = moved[name]["layer_0"]
        bent = {**first, "kernel": first["kernel"] + step * normal(200, *first["kernel"].shape)}
        moved[name] = {**moved[name], "layer_0": bent}
        merged = transfer.apply({}, moved["source"], moved["target"])
        return jnp.sum(merged["layer_1"]["kernel"] ** 2)

    for name in ("source", "target"):
        of = functools.partial(value, name=name)
        difference = (of(1e-2) - of(-1e-2)) / 2e-2
        assert abs(difference) > 1e-2
        np.testing.assert_allclose(jax.grad(of)(0.0), difference, rtol=0.02)


def test_transport_costs_what_its_products_cost_and_has_no_adapter():
    source, target = layers(110, (3, 9, 7, 4)), layers(120, (3, 6, 5, 4))
    rows = mj.optimal_transport_transfer(IN_ORDER).describe(source, target)
    assert [row.target for row in rows] == list(IN_ORDER)
    assert {(row.adapter, row.parameters) for row in rows} == {("", 0)}
    # Of the second kernel: Q on the inputs, distances, P on the rows.
    assert rows[2].flops == 2 * 6 * 9 * 7 + 2 * (5 * 7 * 6) + 2 * (5 * 7 * 6)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mj.linear_operator_transfer, {"start": "overlp"}, "unknown start 'overlp'; did you mean 'overlap'"),
        (mj.linear_operator_transfer, {"shared": 1}, "shared must be True or False, got 1"),
        (mj.parameter_generator_transfer, {"output": "wram"}, "unknown output form 'wram'"),
        (mj.optimal_transport_transfer, {"weight": 1.5}, r"weight must lie in \[0, 1\], got 1.5"),
        (mj.optimal_transport_transfer, {"regularisation": 0}, "regularisation must be a finite number above 0, got 0"),
        (mj.optimal_transport_transfer, {"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_at_once(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(ROUTES, **options)


ALL = [mj.weight_selection_transfer, mj.linear_operator_transfer, mj.parameter_generator_transfer,
       mj.optimal_transport_transfer]  # fmt: skip


@pytest.mark.parametrize("make", [make for make in ALL if make is not mj.parameter_generator_transfer])
def test_blocks_of_attention_are_refused(make):
    with pytest.raises(
        ValueError, match="the route to 'a' has the view 'attention', which this transfer does not support"
    ):
        make([mj.Route("a", "a", view="attention")])
