"""The census reads programs right: written by hand in every form that XLA has, and compiled."""

# SPDX-License-Identifier: Apache-2.0
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from megajax.parallel.census import Collective, census
from megajax.parallel.hlo import dot_flops

MESH = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
DP, TP = ("dp",), ("tp",)


ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def _entry(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule jit_f, is_scheduled=true, num_partitions=8\n{ADD}{before}\n"
        f"ENTRY %main.1_spmd (p: f32[8,4], /*index=1*/q: bf16[16]) -> f32[8,4] {{\n"
        f"  %p = f32[8,4]{{1,0}} parameter(0)\n  %q = bf16[16]{{0}} parameter(1)\n{body}\n}}\n"
    )


def _only(*lines: str, before: str = "") -> Collective:
    [found] = census(_entry(*lines, before=before), MESH)
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", TP, 4),
        ("{{4,6,5,7},{3,0,1,2}}", TP, 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", DP, 2),
        ("{}", ("dp", "tp"), 8),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("{{0,1},{2,3},{4,5},{6,7}}", None, 2),  # half of tp
        ("{{0,5},{1,4},{2,6},{3,7}}", None, 2),
        ("{{0,1,2,3,4,5},{6,7}}", None, 6),
        ("[2,4]<=[8]", TP, 4),
        ("[4,2]<=[2,4]T(1,0)", DP, 2),
        ("[1,8]<=[8]", ("dp", "tp"), 8),
        ("[4,2]<=[2,2,2]T(0,2,1)", None, 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", TP, 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1','axis_0'}", ("dp", "tp"), 8),
        ("mesh['a'=2,'b'=2,'c'=2] {'b','c'}", TP, 4),
        ("mesh['x'=8] {'x':(1)2}", DP, 2),
        ("mesh['x'=8] {'x':(2)4}", TP, 4),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", None, 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", TP, 4),
        ("mesh['x'=2,'y'=4], device_ids=(4,5,6,7,0,1,2,3) {'y'}", TP, 4),
    ],
)
def test_groups_are_mesh_axes(groups, axes, size):
    found = _only(f"ROOT %ar = f32[8,4]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert (found.axes, found.group_size) == (axes, size)


@pytest.mark.parametrize(
    ("pairs", "axes", "size"),
    [
        ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", TP, 4),
        ("{{0,4},{4,0}}", DP, 2),
        ("{{0,5},{1,1}}", ("dp", "tp"), 8),
        ("{{0,0}}", (), 1),
    ],
)
def test_permutes_move_along_mesh_axes(pairs, axes, size):
    found = _only(f"%c = f32[8,4]{{1,0}} collective-permute(%p), channel_id=1, source_target_pairs={pairs}")
    assert (found.axes, found.group_size, found.bytes_sent) == (axes, size, 128 * bool(axes))


TP_GROUPS = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "sizes"),  # sizes: operand, result, sent; p holds 128 bytes and q 32, groups are of 4
    [
        (f"%x = f32[8,4]{{1,0}} all-reduce(%p), {TP_GROUPS}, to_apply=%add", "all-reduce", (128, 128, 192)),
        (f"%x = f32[8,16]{{1,0}} all-gather(%p), {TP_GROUPS}, dimensions={{1}}", "all-gather", (128, 512, 384)),
        (f"%x = f32[2,4]{{1,0}} reduce-scatter(%p), {TP_GROUPS}, to_apply=%add", "reduce-scatter", (128, 32, 96)),
        (f"%x = f32[8,4]{{1,0}} all-to-all(%p), {TP_GROUPS}, dimensions={{0}}", "all-to-all", (128, 128, 96)),
        (
            f"%x = (f32[8,4]{{1,0}}, bf16[16]{{0}}) all-reduce(%p, /*index=1*/%q), {TP_GROUPS}, to_apply=%add",
            "all-reduce",
            (160, 160, 240),
        ),
        (f"%x = f32[8,4]{{1,0}} all-reduce-start(%p), {TP_GROUPS}, to_apply=%add", "all-reduce", (128, 128, 192)),
        (
            f"%x = ((f32[8,4]{{1,0}}, bf16[16]{{0}}), (f32[8,16]{{1,0:S(1)}}, bf16[64]{{0}})) all-gather-start(%p, %q),"
            f" channel_id=2, {TP_GROUPS}, dimensions={{0}}",
            "all-gather",
            (160, 640, 480),
        ),
        (
            f"%x = ((f32[8,4]{{1,0}}), f32[2,4]{{1,0}}) reduce-scatter-start(%p), {TP_GROUPS}, to_apply=%add",
            "reduce-scatter",
            (128, 32, 96),
        ),
        (
            "%x = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(f32[8,4]{1,0} %p),"
            " source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            (128, 128, 128),
        ),
        (
            "%x = ((f32[8,4]{1,0}, bf16[16]{0}), (f32[8,4]{1,0}, bf16[16]{0})) collective-permute-start(%p, %q),"
            " source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            (160, 160, 160),
        ),
        (
            "%x = f32[8,4]{1,0} collective-permute(%p, %p, %q, %q), source_target_pairs={{0,1}}, slice_sizes={{8,4}}",
            "collective-permute",
            (128, 128, 128),
        ),
        (
            f"%x = (bf16[16], bf16[16], bf16[16], bf16[16]) all-to-all(%q, %q, %q, %q), {TP_GROUPS}",
            "all-to-all",
            (128, 128, 96),
        ),
        (
            f"%x = f32[8,4]{{1,0}} ragged-all-to-all(%p, %p, %q, %q, %q, %q), {TP_GROUPS}",
            "ragged-all-to-all",
            (128, 128, 96),
        ),
        (  # where one side has room for the worst case, what comes is what the other holds
            f"%x = bf16[16]{{0}} ragged-all-to-all(%p, %q, %q, %q, %q, %q), {TP_GROUPS}",
            "ragged-all-to-all",
            (128, 32, 24),
        ),
        (f"%x = bf16[16]{{0}} collective-broadcast(%q), {TP_GROUPS}", "collective-broadcast", (32, 32, 32)),
        (
            "%x = (f32[8,4]{1,0}, u32[], token[]) send(%p, %token), channel_id=1,"
            ' frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,0}}"}',
            "collective-permute",
            (128, 128, 128),
        ),
    ],
)
def test_bytes(line, kind, sizes):
    found = _only(line, "%done = f32[8,4]{1,0} all-reduce-done(%x)")
    assert (found.kind, (found.operand_bytes, found.result_bytes, found.bytes_sent)) == (kind, sizes)
    assert (found.name, found.loops, found.times, found.conditional) == ("x", (), 1, False)
    assert found.arrays == 1 + (sizes[0] == 160)


@pytest.mark.parametrize(
    ("shape", "size"),
    [("pred[3]", 3), ("bf16[]", 2), ("s4[5]{0:E(4)}", 3), ("f8e4m3fn[2,2]", 4), ("c64[2]", 16), ("f32[0]", 0)],
)
def test_bytes_of_types(shape, size):
    found = _only(f"%a = {shape} copy(%p)", f"%x = {shape} collective-permute(%a), source_target_pairs={{{{0,1}}}}")
    assert found.operand_bytes == size


CALLED = """
%async_computation (x: f32[8,4]) -> f32[2,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %inner = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%layer (x: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %y = f32[8,4]{1,0} get-tuple-element(%x), index=1, metadata={op_name="jit(f)/layer/dot"}
  %copy = f32[8,4]{1,0} copy(%y)
  %start = ((f32[8,4]{1,0}), f32[2,4]{1,0}) async-start(%copy), calls=%async_computation
  %done = f32[2,4]{1,0} async-done(%start), calls=%async_computation
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}

%condition (x: (s32[], f32[8,4])) -> pred[] {
  %x = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%yes (x: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %layers = (s32[], f32[8,4]{1,0}) while(%x), condition=%condition, body=%layer, CONFIG3
}

%no (x: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  ROOT %x = (s32[], f32[8,4]{1,0}) parameter(0)
}

%microbatch (x: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (s32[], f32[8,4]{1,0}) parameter(0)
  %pred = pred[] constant(true)
  ROOT %if = (s32[], f32[8,4]{1,0}) conditional(%pred, %x, %x), BRANCHES
}
"""
NESTED = (
    "%zero = s32[] constant(0)",
    "%start = (s32[], f32[8,4]{1,0}) tuple(%zero, %p)",
    "%steps = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%microbatch, CONFIG5",
)


def _nested(branches: str, trips: dict[str, int]) -> str:
    text = _entry(*NESTED, before=CALLED).replace("BRANCHES", branches)
    for loop in ("3", "5"):
        config = f'"known_trip_count":{{"n":"{trips[loop]}"}},"known_init_step":{{"init":"0"}}' if loop in trips else ""
        text = text.replace(f"CONFIG{loop}", f"backend_config={{{config}}}")
    return text


@pytest.mark.parametrize(
    "branches", ["branch_computations={%yes, %no}", "true_computation=%yes, false_computation=%no"]
)
def test_loops_and_conditionals(branches):
    [found] = census(_nested(branches, {"3": 3, "5": 5}), MESH)
    assert (found.loops, found.times, found.conditional, found.kind) == ((5, 3), 15, True, "reduce-scatter")
    assert str(found) == "reduce-scatter over tp, 5 x 3 times at most, 128 -> 32 bytes: inner"


def test_unknown_trip_counts_are_said():
    [found] = census(_nested("branch_computations={%yes, %no}", {"3": 3}), MESH)
    assert (found.loops, found.times) == ((None, 3), 3)


def test_op_name_of_the_operand():
    line = f"%x = f32[2,4]{{1,0}} reduce-scatter(%b), {TP_GROUPS}"
    assert _only('%b = f32[8,4]{1,0} negate(%p), metadata={op_name="jit(f)/neg"}', line).op_name == "jit(f)/neg"
    named = _only('%b = f32[8,4]{1,0} negate(%p), metadata={op_name="a"}', line + ', metadata={op_name="b"}')
    assert (named.op_name, _only("%b = f32[8,4]{1,0} negate(%p)", line).op_name) == ("b", "")


def test_mistakes():
    with pytest.raises(ValueError, match="for 8 devices has no census on a mesh of 4"):
        census(_entry(), jax.make_mesh((4,), ("tp",), devices=jax.devices()[:4]))
    with pytest.raises(ValueError, match="no entry computation"):
        census("module @jit_f { func.func public @main() }", MESH)
    with pytest.raises(ValueError, match="x: no replica_groups"):
        _only("%x = f32[8,4]{1,0} all-reduce(%p), replica_groups=everyone, to_apply=%add")


DOT = """
%fused (a: f32[2,8,16], b: f32[2,16,32]) -> f32[2,8,32] {
  %a = f32[2,8,16]{2,1,0} parameter(0)
  %b = f32[2,16,32]{2,1,0} parameter(1)
  ROOT %dot = f32[2,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}
}

%body (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %fusion = f32[2,8,32]{2,1,0} fusion(%x, %x), kind=kOutput, calls=%fused
}
"""
GEMM = (
    '"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
    '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}'
)


def test_dot_flops_by_hand():
    loop = '%w = f32[2]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    condition = "%c (x: f32[2]) -> pred[] {\n  ROOT %t = pred[] constant(true)\n}\n"
    assert dot_flops(_entry(loop, before=DOT + condition)) == 7 * 2 * (2 * 8 * 32) * 16
    gemm = '%g = (f32[4,3]{1,0}, s8[64]{0}) custom-call(%p, %q), custom_call_target="__cublas$gemm", backend_config={'
    assert dot_flops(_entry(gemm + GEMM + "}")) == 2 * 4 * 3 * 8
    with pytest.raises(ValueError, match="does not say what it contracts"):
        dot_flops(_entry(gemm + "}"))


@pytest.fixture(scope="module")
def compiled() -> str:
    """One collective of each kind in a loop of three, the products of it, and one more in a branch outside."""

    def layer(x, _):
        x = x + jax.lax.psum(x @ x.T, "tp") @ x
        x = jax.lax.psum_scatter(jax.lax.all_gather(x, "dp", tiled=True), "dp", tiled=True)
        x = jax.lax.ppermute(x, "tp", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jax.lax.all_to_all(x, "tp", split_axis=0, concat_axis=0, tiled=True), None

    @partial(jax.shard_map, mesh=MESH, in_specs=PartitionSpec("dp", "tp"), out_specs=PartitionSpec(), check_vma=False)
    def f(x):
        x, _ = jax.lax.scan(layer, x, None, length=3)
        return jax.lax.cond(jnp.sum(x) > 0, lambda: jax.lax.pmax(x, ("dp", "tp")), lambda: x)

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((16, 32), jnp.float32)).compile().as_text()
    assert text is not None
    return text


def test_census_of_a_compiled_program(compiled):
    found = {(c.kind, c.axes): c for c in census(compiled, MESH)}
    size = 8 * 8 * 4  # on one device, and of the product, too
    assert {key: (c.loops, c.conditional, c.operand_bytes, c.result_bytes) for key, c in found.items()} == {
        ("all-reduce", TP): ((3,), False, size, size),
        ("all-gather", DP): ((3,), False, size, 2 * size),
        ("reduce-scatter", DP): ((3,), False, 2 * size, size),
        ("collective-permute", TP): ((3,), False, size, size),
        ("all-to-all", TP): ((3,), False, size, size),
        ("all-reduce", ("dp", "tp")): ((), True, size, size),
    }
    assert len(census(compiled, MESH)) == 6
    assert all("shard_map" in c.op_name for c in found.values())


def test_dot_flops_of_a_compiled_program(compiled):
    assert dot_flops(compiled) == 3 * 2 * (2 * 8 * 8 * 8)
