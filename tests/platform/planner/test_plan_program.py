"""A compiled program's FLOPs and collectives: loops as often as they run, padding of convolutions not counted."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from openmoe.platform.planner import plan_program


def test_products_and_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = jax.make_mesh((8,), ("x",))
    by_rows, whole = (NamedSharding(mesh, spec) for spec in (P("x"), P()))

    def five_times(x, w):
        def once(x, _):
            return jnp.tanh(x @ w), jnp.sum(x)

        return jax.lax.scan(once, x, None, length=5)

    jitted = jax.jit(five_times, in_shardings=(by_rows, whole), out_shardings=(by_rows, whole))
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 32), (32, 32)))
    found = plan_program.read(jitted.lower(*shapes).compile().as_text())
    assert found.product_flops == 5 * 2 * 8 * 32 * 32
    assert sum(each.times * each.size_bytes for each in found.exchanges if each.kind == "all-reduce") == 5 * 4


TPU_PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[2,2048,2048], param_1: bf16[24,2048,128]) -> bf16[2,2048,24,128] {
  %param_0 = bf16[2,2048,1,2048]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[24,2048,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[2,2048,24,128]{3,1,2,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
window={size=1x24 pad=0_0x23_23 rhs_reversal=0x1}, dim_labels=0b1f_1io0->0b1f
}

%body (wide.param: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %wide.param = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %all-to-all.1 = (bf16[8,4]{1,0:T(8,128)(2,1)}, /*index=1*/f32[2]{0}) all-to-all(%x), channel_id=1, \
metadata={op_name="layers_5/mlp/all_to_all"}
}

%cond (wide.param.1: (s32[], bf16[8,4])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(4)
}

ENTRY %main (p: bf16[2,2048,1,2048], q: bf16[24,2048,128]) -> bf16[2,2048,24,128] {
  %p = bf16[2,2048,1,2048]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[24,2048,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %while.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%tuple), condition=%cond, body=%body
  ROOT %fusion.1 = bf16[2,2048,24,128]{3,1,2,0:T(8,128)(2,1)} fusion(%p, %q), kind=kOutput, calls=%fused
}
"""


def test_of_a_tpus_convolutions_only_what_meets_an_input_is_counted():
    """Heads are a window's positions there: 24 of them, each with the one input position among 46 of padding."""
    found = plan_program.read(TPU_PROGRAM.replace("\\\n", ""))
    assert found.product_flops == 2 * 2 * 2048 * 24 * 128 * 2048
    assert found.exchanges == [plan_program.Exchange("all-to-all", 72, 4, "layers_5/mlp/all_to_all")]
    assert found.exchanged_bytes() == {"all-to-all": 288}
    read_and_written = 2 * (2 * 2048 * 2048 + 24 * 2048 * 128 + 2 * 2048 * 24 * 128)
    assert found.moved_bytes == read_and_written + 4 * 72


def test_of_an_array_that_a_loop_takes_slices_of_only_those_are_moved():
    def rows(x):
        return jax.lax.scan(lambda total, row: (total + row, jnp.sum(row)), jnp.zeros(256), x)

    found = plan_program.read(jax.jit(rows).lower(jax.ShapeDtypeStruct((64, 256), jnp.float32)).compile().as_text())
    assert 64 * 256 * 4 < found.moved_bytes < 10 * 64 * 256 * 4  # and not 64 times all of it
