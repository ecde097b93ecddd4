import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from badloss_jax.core.mesh import abstract_mesh, by_rows, make_mesh, replicated
from badloss_jax.core.program import bytes_on_device, count_flops, loop_rounds, read_compiled, read_listing


def flops(function, *shapes, platform="tpu"):
    traced = jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
    return count_flops(traced.jaxpr.jaxpr, platform)


def convolution(images, kernel, stride=1):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_products_and_convolutions_are_counted():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert flops(convolution, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_backward_pass_of_a_convolution_takes_twice_the_forward_pass(stride):
    def loss(images, kernel):
        return (convolution(images, kernel, stride) ** 2).sum()

    shapes = (2, 8, 8, 4), (3, 3, 4, 16)
    forward = flops(loss, *shapes)
    assert flops(jax.grad(loss, argnums=(0, 1)), *shapes) == pytest.approx(3 * forward, rel=0.35)
    assert flops(jax.grad(loss, argnums=1), *shapes) == pytest.approx(2 * forward, rel=0.35)


def test_loops_count_for_each_round_and_choices_for_the_platform():
    def looped(a):
        return lax.scan(lambda carried, _: (carried @ a, None), a, length=6)[0]

    def chosen(a):
        return lax.platform_dependent(a, cpu=lambda a: a @ a @ a, default=lambda a: a @ a)

    one = 2 * 5**3
    assert flops(looped, (5, 5)) == 6 * one
    assert flops(chosen, (5, 5), platform="cpu") == 2 * one
    assert flops(chosen, (5, 5), platform="tpu") == one


def test_rounds_of_loops_are_listed_in_order():
    def program(a):
        a = lax.scan(lambda carried, _: (carried + 1, None), a, length=6)[0]
        return lax.while_loop(lambda a: a.sum() > 0, lambda a: a - 1, a)

    assert loop_rounds(jax.jit(program).trace(jnp.ones(3)).jaxpr.jaxpr) == [6, 25]


def test_a_device_holds_its_share_of_rows_and_the_whole_of_what_is_replicated():
    mesh = abstract_mesh(4)
    rows = jax.ShapeDtypeStruct((8, 3), np.float32, sharding=by_rows(mesh))
    whole = jax.ShapeDtypeStruct((5,), np.float16, sharding=replicated(mesh))
    assert bytes_on_device({"a": rows, "b": whole}, 4) == 2 * 3 * 4 + 5 * 2


LISTING = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, must-alias) }, \
entry_computation_layout={(f32[100,8]{1,0})->f32[100,8]{1,0}}

%fused_computation.1 (param_0: f32[100,8]) -> f32[100,8] {
  %copy.1 = f32[100,8]{0,1} copy(%param_0)
}

%body.2 (param: f32[100]) -> f32[100] {
  ROOT %fusion.9 = f32[100]{0} fusion(%param), backend_config={"estimated_cycles":"10"}
}

%condition.3 (param: f32[100]) -> pred[] {
  ROOT %less = pred[]{:T(512)} compare(%param, %param), backend_config={"estimated_cycles":"1"}
}

ENTRY %main.4 (param.1: f32[100,8], param.2: bf16[64]) -> f32[100,8] {
  %copy.2 = f32[100,8]{0,1:T(8,128)} copy(%param.1), backend_config={"estimated_cycles":"100"}
  %copy.3 = f32[3]{0} copy(%param.2)
  %copy-start.4 = (f32[100,8]{1,0}, f32[100,8]{0,1}, u32[]) copy-start(%copy.2)
  %copy-done.4 = f32[100,8]{1,0} copy-done(%copy-start.4)
  %copy-start.5 = (f32[100,8]{1,0:T(8,128)S(1)}, f32[100,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%copy-done.4)
  %copy-done.5 = f32[100,8]{1,0:T(8,128)S(1)} copy-done(%copy-start.5)
  %copy.6 = f32[100,8]{0,1:T(8,128)S(1)} copy(%copy-done.5)
  %copy.7 = f32[100,8]{1,0:T(8,128)} copy(%copy.6)
  %all-reduce.5 = (f32[64]{0}, bf16[10,2]{1,0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %all-gather-start.6 = (s32[8]{0}, s32[64]{0}) all-gather-start(%c), channel_id=2
  %all-gather-done.6 = s32[64]{0} all-gather-done(%all-gather-start.6)
  %while.7 = (f32[100]{0}) while(%tuple), condition=%condition.3, body=%body.2
  ROOT %fusion.8 = f32[100,8]{1,0} fusion(%all-reduce.5), backend_config={"estimated_cycles":"1000"}
}
"""


def test_a_listing_says_what_is_aliased_copied_exchanged_and_expected():
    listing = read_listing(LISTING, [((100, 8), np.float32)], rounds=[25])
    assert listing.updated == 2
    assert listing.copies == (3, 3 * 3200)  # not those within a fusion, nor small ones
    assert listing.moves == (2, 2 * 3200)
    assert listing.collectives == {"all-reduce": (1, 64 * 4 + 20 * 2), "all-gather": (1, 64 * 4)}
    assert listing.cycles == 1100 + 25 * 11
    assert read_listing(LISTING.replace("estimated_cycles", ""), [], []).cycles is None


def test_what_xla_compiles_here_is_read():
    mesh = make_mesh()
    sharding, whole = by_rows(mesh), replicated(mesh)

    def step(state, rows):
        return state + rows.sum(0), rows * 2

    compiled = (
        jax.jit(step, donate_argnums=0, in_shardings=(whole, sharding), out_shardings=(whole, sharding))
        .trace(jax.ShapeDtypeStruct((1000,), np.float32), jax.ShapeDtypeStruct((80, 1000), np.float32))
        .lower()
        .compile()
    )
    figures = read_compiled(compiled, [((1000,), np.float32)], [])
    assert figures.arguments == 4000 + 40_000
    assert figures.outputs == pytest.approx(44_000, abs=100)  # with the tuple that they are in
    assert figures.aliased == 4000
    assert figures.updated == 1
    assert figures.peak >= 84_000
    assert figures.collectives == {"all-reduce": (1, 4000)}
    assert figures.cycles is None
