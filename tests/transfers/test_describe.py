import jax
import jax.numpy as jnp
import numpy as np
import pytest

import merge_jax as mj
from merge_jax.transfers.describe import count_flops

LAYER = {"kernel": jnp.ones((48, 32))}
SOURCE = {f"layer_{i}": LAYER for i in range(4)}
TARGET = {f"layer_{i}": {"kernel": jnp.ones((24, 16))} for i in range(2)}


def printed(capsys, transfer, source=SOURCE, target=TARGET):
    mj.summarize(transfer, source, target)
    return capsys.readouterr().out


def test_the_table_names_routes_matrices_rank_parameters_and_cost(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    routes = mj.match(SOURCE, TARGET, source="*/kernel", target="*/kernel")
    transfer = mj.lpka_transfer(routes, rank=8, num_layers=1)
    text = printed(capsys, transfer)
    adapter = jax.eval_shape(transfer.init, jax.random.key(0), SOURCE, TARGET)
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    for part in ("layer_0/kernel", "layer_3/kernel", "24x16", "16x24 from 32x48", "matrix", " 8 ", f"{size // 2:,}",
                 "MFLOP", f"2 routes in 1 batch: {size:,} adapter parameters"):  # fmt: skip
        assert part in text, part


def test_a_shared_adapter_is_counted_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    transfer = mj.lpka_transfer({"*/kernel": "layer_0/kernel"}, shared=True, num_layers=1)
    adapter = jax.eval_shape(transfer.init, jax.random.key(0), SOURCE, TARGET)
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    text = printed(capsys, transfer)
    assert f"2 routes in 1 batch: {size:,} adapter parameters" in text
    assert "shared" in text


def test_what_is_cut_and_what_cannot_be_paired_is_listed_before_anything_runs(capsys):
    source = {"a": jnp.ones((4, 6)), "s": jnp.ones(()), "old": jnp.ones(2), "w": {"embedding": jnp.ones((5, 2))}}
    target = {"a": jnp.ones((2, 3)), "s": jnp.ones(()), "new": jnp.ones(2), "w": {"embedding": jnp.ones((7, 2))}}
    for transfer in (mj.share_transfer({"**": "**"}), mj.mlp_transfer([mj.Route("**", "**", unmatched="skip")])):
        summary = mj.summarize(transfer, source, target)
        text = capsys.readouterr().out
        assert str(summary).split() == text.split()
        assert "3x2 of 6x4" in text
        assert "unmatched='skip'" in text
        assert [row.target for row in summary.routes] == ["a"]
        reasons = {row.target or row.source: row.left_out for row in summary.left_out}
        assert reasons.keys() == {"s", "new", "old", "w/embedding"}
        assert "rank of 1 or more" in reasons["s"]
        assert "no partner of its path in the source" in reasons["new"]
        assert "no partner of its path in the target" in reasons["old"]
        assert "Rows.by_name" in reasons["w/embedding"]
        assert repr(summary) == "Summary(1 route, 4 left out)"


RELATIVES = mj.weight_selection_transfer, mj.linear_operator_transfer, mj.optimal_transport_transfer


def test_relatives_and_combinators_list_it_too():
    tree = {"a": jnp.ones((2, 3)), "s": jnp.ones(())}
    for make in RELATIVES:
        summary = mj.summarize(make({"**": "**"}), tree, tree)
        assert [row.target for row in summary.left_out] == ["s"]
        assert len(summary.routes) == 1
    several = mj.several_sources({"one": mj.share_transfer({"**": "**"})})
    assert [row.source for row in mj.summarize(several, {"one": tree}, tree).left_out] == ["one: s"]
    chained = mj.chain(mj.share_transfer({"**": "**"}), mj.share_transfer({"a": "a"}))
    summary = mj.summarize(chained, tree, tree)
    assert (len(summary.routes), len(summary.left_out)) == (2, 1)


def test_a_transfer_without_routes_says_so(capsys):
    assert "without routes" in printed(capsys, mj.identity_transfer())


def test_a_bad_route_is_named(capsys):
    with pytest.raises(ValueError, match="unknown target path 'layer_0/kernal'"):
        printed(capsys, mj.lpka_transfer({"layer_0/kernal": "layer_0/kernel"}))


def test_shapes_alone_are_enough(capsys):
    def shapes(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    text = printed(capsys, mj.lpka_transfer({"*/kernel": "layer_0/kernel"}), shapes(SOURCE), shapes(TARGET))
    assert "2 routes" in text


def test_products_are_counted_and_loops_as_often_as_they_run():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert count_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
    assert count_flops(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), a, b) == 2 * 3 * 4 * 5
    assert count_flops(lambda a: jax.lax.map(lambda row: row @ b, a), a) == 2 * 3 * 4 * 5
    square = jnp.ones((4, 4))
    assert count_flops(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ square, x), square) == 7 * 2 * 4**3
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), square) == 2 * 4**3
    assert count_flops(lambda x: jnp.einsum("bij,bjk->bik", x, x), jnp.ones((6, 4, 4))) == 6 * 2 * 4**3


@pytest.mark.parametrize(
    ("m", "n", "p", "q", "options"),
    [
        (200, 200, 100, 320, {"max_width": None, "max_hidden": None}),
        (200, 200, 100, 320, {"max_width": 64, "max_hidden": 96}),
        (96, 96, 48, 80, {"max_width": 128, "max_hidden": 64, "attentions": ("rows_rows", "cols_rows")}),
    ],
)
def test_the_cost_of_a_layer_is_its_formula_and_what_xla_counts(m, n, p, q, options):
    """`4 D (m n + p q + r s)` for an attention of `r` on `s` tokens, `4 m n f` for the feed-forward block.

    Of matrices with as many rows as columns, so that no queries are padded.
    """
    layer = mj.LPKA(mj.transfers.LPKAOptions(num_layers=1, num_heads=8, spectral=False, **options))
    target, source = jnp.ones((m, n)), jnp.ones((p, q))
    variables = jax.eval_shape(layer.init, jax.random.key(0), target, source)
    sizes = {"rows_rows": (m, p, n, q), "rows_cols": (m, q, n, p), "cols_rows": (n, p, m, q), "cols_cols": (n, q, m, p)}
    flops = parameters = 0
    for name in options.get("attentions", sizes):
        r, s, c, k = sizes[name]
        width = max((c + k) // 2, 128)
        width = min(width, options["max_width"] or width) // 8 * 8
        flops += 4 * width * (m * n + p * q + r * s)
        parameters += 2 * width * (c + k)
    hidden = min(2 * n, options["max_hidden"] or 2 * n)
    flops, parameters = flops + 4 * m * n * hidden, parameters + 2 * n * hidden
    kernels = sum(leaf.size for path, leaf in mj.flatten(variables["params"]).items() if path.endswith("kernel"))
    assert kernels == parameters
    assert count_flops(layer.apply, variables, target, source) == flops
    compiled = jax.jit(layer.apply).lower(variables, target, source).compile()
    np.testing.assert_allclose(compiled.cost_analysis()["flops"], flops, rtol=0.1)


def test_the_caps_keep_large_routes_small():
    """Published widths give a 768x3072 route 215 million parameters; the defaults change nothing where it is small."""

    def size(factory, m, n, p, q, **options):
        source, target = (jax.ShapeDtypeStruct((b, a), jnp.float32) for a, b in ((p, q), (m, n)))
        transfer = factory({"w": "w"}, **options)
        return sum(row.parameters for row in transfer.describe({"w": source}, {"w": target}))

    assert 213e6 < size(mj.published_transfer, 768, 3072, 768, 3072) < 216e6
    assert size(mj.lpka_transfer, 768, 3072, 768, 3072) < 0.25 * 215e6
    assert size(mj.lpka_transfer, 4096, 11008, 4096, 11008, rank=64) < 0.1 * 2e9
    assert size(mj.lpka_transfer, 60, 90, 50, 80) == size(mj.published_transfer, 60, 90, 50, 80) + 1  # The gate.
