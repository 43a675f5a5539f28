"""The plan of a large pair: sizes that are known, what a device holds by an independent count, and the collectives."""

import jax
import jax.numpy as jnp

from benchmarks import plan_pair
from benchmarks.collectives import received_bytes

PROGRAM = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (state: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %all-gather.1 = f32[16,8]{1,0} all-gather(%part), channel_id=1, dimensions={0}
  %all-reduce.1 = (f32[4]{0}, bf16[4]{0}) all-reduce(%x, %y), channel_id=2, to_apply=%sum
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %while.1 = (s32[], f32[16,8]) while(%init), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %reduce-scatter = f32[4,8]{1,0} reduce-scatter(%y), channel_id=3, dimensions={0}, to_apply=%sum
}
"""


def test_both_models_have_the_parameters_that_their_authors_count():
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one.shapes())) for one in (plan_pair.LARGE, plan_pair.SMALL)]
    assert sizes == [6_738_415_616, 1_235_814_400]


def test_a_device_holds_its_part_and_what_does_not_divide():
    tree = {"split": jnp.zeros((24, 1024)), "odd": jnp.zeros((63, 101)), "small": jnp.zeros(8)}
    held = plan_pair.bytes_on_a_device(tree, 8)
    whole = 4 * (63 * 101 + 8)
    assert held == (4 * 24 * 1024 // 8 + whole, whole, "odd")


def test_the_adapter_of_all_routes_is_planned_without_arrays():
    small = plan_pair.Decoder(64, 32, 2, 64, 4, 2, True)
    plan = plan_pair.plan_state(small, small, "shared", 8)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(plan.state))
    assert len(plan.transfer.describe(small.shapes(), small.shapes())) == 14
    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    assert jax.eval_shape(lambda *given: plan_pair.llama(small, *given), small.shapes(), tokens).shape == (2, 6, 64)


def test_collectives_count_as_often_as_they_run():
    received = received_bytes(PROGRAM, 4)
    gathered, summed, scattered = 16 * 8 * 4 * 3 / 4, 2 * (4 * 4 + 4 * 2) * 3 / 4, 4 * 8 * 4 * 3
    assert received == {"all-gather": 3 * gathered, "all-reduce": 3 * summed, "reduce-scatter": scattered}
