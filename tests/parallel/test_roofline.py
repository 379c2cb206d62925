"""The bound of a program's time, against arithmetic by hand on programs short enough to read."""

# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from megajax.parallel.aot import TARGETS
from megajax.parallel.roofline import Taken, estimate

# A product of 2 * 1024^3 FLOPs takes 2.147 ms and the sum of 4 MiB over two devices 4.194 ms, both without their rest.
GPU = dataclasses.replace(TARGETS["h100"], bf16=1e12, bandwidth=1e15, nvlink=1e9)
PRODUCT, SUM = 2 * 1024**3 / 1e12, 4 * 1024**2 / 1e9

DOT = "dot({0}, {0}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
GROUPS = "channel_id=1, replica_groups={{0,1}}, to_apply=%add"


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("tp",))


def program(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule test, num_partitions=2
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}
{before}
ENTRY %main (p: f32[1024,1024]) -> f32[1024,1024] {{
  %p = f32[1024,1024]{{1,0}} parameter(0)
{body}
}}
"""


def test_products_beside_a_collective_hide_it():
    found = estimate(
        program(
            f"%start = f32[1024,1024]{{1,0}} all-reduce-start(%p), {GROUPS}",
            f"%d = f32[1024,1024]{{1,0}} {DOT.format('%p')}",
            "%done = f32[1024,1024]{1,0} all-reduce-done(%start)",
            "ROOT %r = f32[1024,1024]{1,0} add(%done, %d)",
        ),
        mesh(),
        GPU,
    )
    assert found.flops == 2 * 1024**3 and found.recomputed == 0
    assert found.compute == pytest.approx(PRODUCT, rel=1e-4)
    [transfer] = found.transfers
    assert transfer.asynchronous and transfer.sent == 4 * 1024**2 and not transfer.network
    assert transfer.exposed == pytest.approx(SUM - PRODUCT, rel=1e-4) == found.exposed
    assert found.seconds == pytest.approx(SUM, rel=1e-4)


def test_a_synchronous_collective_is_waited_for():
    found = estimate(
        program(
            f"%s = f32[1024,1024]{{1,0}} all-reduce(%p), {GROUPS}",
            f"ROOT %d = f32[1024,1024]{{1,0}} {DOT.format('%p')}",
        ),
        mesh(),
        GPU,
    )
    assert found.seconds == pytest.approx(SUM + PRODUCT, rel=1e-4)
    assert not found.transfers[0].asynchronous


LOOP = """
%idle (x: f32[1024,1024]) -> f32[1024,1024] {{
  ROOT %x = f32[1024,1024]{{1,0}} parameter(0)
}}
%busy (y: f32[1024,1024]) -> f32[1024,1024] {{
  %y = f32[1024,1024]{{1,0}} parameter(0)
  %s = f32[1024,1024]{{1,0}} all-reduce(%y), {groups}
  ROOT %e = f32[1024,1024]{{1,0}} {dot}, metadata={{op_name="jit(f)/rematted_computation/dot_general"}}
}}
%body (c: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {{
  %c = (s32[], f32[1024,1024]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %z = f32[1024,1024]{{1,0}} get-tuple-element(%c), index=1
  %n = f32[1024,1024]{{1,0}} conditional(%i, {inputs}), branch_computations={{{branches}}}
  ROOT %t = (s32[], f32[1024,1024]{{1,0}}) tuple(%i, %n)
}}
%cond (d: (s32[], f32[1024,1024])) -> pred[] {{
  %d = (s32[], f32[1024,1024]{{1,0}}) parameter(0)
  ROOT %k = pred[] constant(true)
}}
"""


def looped(*branches: str) -> str:
    before = LOOP.format(
        groups=GROUPS,
        dot=DOT.format("%y"),
        inputs=", ".join("%z" for _ in branches),
        branches=", ".join(branches),
    )
    return program(
        "%zero = s32[] constant(0)",
        "%init = (s32[], f32[1024,1024]{1,0}) tuple(%zero, %p)",
        "%w = (s32[], f32[1024,1024]{1,0}) while(%init), condition=%cond, body=%body,"
        ' backend_config={"known_trip_count":{"n":"10"}}',
        "ROOT %r = f32[1024,1024]{1,0} get-tuple-element(%w), index=1",
        before=before,
    )


def test_branches_count_as_often_as_they_are_taken():
    always = estimate(looped("%idle", "%busy"), mesh(), GPU)
    assert always.flops == always.recomputed == 10 * 2 * 1024**3
    assert always.seconds == pytest.approx(10 * (PRODUCT + SUM), rel=1e-4)
    for order in (("%idle", "%busy"), ("%busy", "%idle")):  # XLA writes either first
        some = estimate(looped(*order), mesh(), GPU, 0.75)
        assert some.flops == pytest.approx(0.75 * always.flops)
        assert some.seconds == pytest.approx(0.75 * always.seconds)
        assert some.transfers[0].times == pytest.approx(7.5)


def test_turns_that_only_a_run_knows():
    text = looped("%idle", "%busy")
    unknown = text.replace(', backend_config={"known_trip_count":{"n":"10"}}', "")
    assert unknown != text
    known = estimate(text, mesh(), GPU)
    for turns in (1, 10):
        found = estimate(unknown, mesh(), GPU, turns=turns)
        assert found.flops == pytest.approx(known.flops * turns / 10)
        assert found.transfers[0].times == turns


def test_a_grouped_kernel_does_what_it_says_of_as_many_rows_as_there_are():
    """Also bytes: of the 4,096 rows of its operand it reads as many as hold something."""
    said = 'frontend_attributes={bytes_a_row="64",bytes_besides="1000",flops_a_row="2000",rows_a_block="128"}'
    name = 'metadata={op_name="jit(step)/rematted_computation"}, backend_config={ir = "", name = "grouped_matmul"}'
    text = program(
        "%x = f32[4096,1024]{1,0} constant({...})",
        f'ROOT %r = f32[4096,1024]{{1,0}} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", {said}, {name}',
    )
    gpu = dataclasses.replace(GPU, bandwidth=1e6)
    for blocks in (1, 5):
        found = estimate(text, mesh(), gpu, blocks_of=lambda rows, blocks=blocks: blocks if rows == 128 else 0)
        assert found.flops == found.recomputed == 2000 * 128 * blocks
        assert found.seconds == pytest.approx((64 * 128 * blocks + 1000) / 1e6)
        assert found.kernels == {"Pallas: grouped_matmul": 1}


def test_a_kernel_of_attention_does_what_it_says():
    said = 'frontend_attributes={flops="8000",flops_again="2000"}'
    name = 'metadata={op_name="jit(step)/transpose"}, backend_config={ir = "", name = "attention_backward_q"}'
    call = f'custom-call(%p), custom_call_target="triton_kernel_call_ffi", {said}, {name}'
    found = estimate(program(f"ROOT %r = f32[1024,1024]{{1,0}} {call}"), mesh(), GPU)
    assert (found.flops, found.recomputed) == (8000, 2000)
    assert found.kernels == {"Pallas: attention_backward_q": 1}


def test_a_loop_that_runs_again_is_recomputed_whatever_its_body_is_called():
    text = looped("%idle", "%busy").replace("rematted_computation", "forward")
    again = text.replace("body=%body,", 'body=%body, metadata={op_name="transpose/rematted_computation/while"},')
    assert estimate(text, mesh(), GPU).recomputed == 0
    found = estimate(again, mesh(), GPU)
    assert found.recomputed == found.flops == 10 * 2 * 1024**3


def test_of_more_branches_the_longest_always_runs():
    found = estimate(looped("%idle", "%busy", "%idle"), mesh(), GPU, 0.75)
    assert found.flops == pytest.approx(10 * 2 * 1024**3)
    assert found.seconds == pytest.approx(10 * (PRODUCT + SUM), rel=1e-4)


def test_what_some_devices_do_alone():
    """Half of the devices take the branch, one of them always: the others wait for it."""
    branches = "branch_computations={%idle, %busy}"
    text = looped("%idle", "%busy").replace(branches, branches + ', metadata={op_name="f/rows_of_layers/cond"}')
    named = {"rows_of_layers": Taken(0.5, 1.0)}
    found = estimate(text, mesh(), GPU, 0.75, taken=named)
    assert found.flops == pytest.approx(0.5 * 10 * 2 * 1024**3)
    assert found.seconds == pytest.approx(10 * (PRODUCT + SUM), rel=1e-4)
    assert found.transfers[0].times == pytest.approx(5)
    others = estimate(text, mesh(), GPU, 0.75, taken={"rows_of_others": Taken(0.5, 1.0)})
    assert others.flops == pytest.approx(0.75 * 10 * 2 * 1024**3)


def test_of_two_branches_side_by_side_each_is_taken_so_often():
    """A branch for each pair: neither, one, the other, both; half of the devices take each, one of them always both."""
    text = looped("%idle", "%busy", "%busy", "%both").replace(
        "branch_computations={%idle, %busy, %busy, %both}",
        'branch_computations={%idle, %busy, %busy, %both}, metadata={op_name="f/rows_of_layers/cond"}',
    )
    both = f"""%both (v: f32[1024,1024]) -> f32[1024,1024] {{
  %v = f32[1024,1024]{{1,0}} parameter(0)
  %u = f32[1024,1024]{{1,0}} {DOT.format("%v")}
  ROOT %q = f32[1024,1024]{{1,0}} {DOT.format("%u")}
}}
"""
    text = text.replace("%body (c:", both + "%body (c:")
    found = estimate(text, mesh(), GPU, taken={"rows_of_layers": Taken(0.5, 1.0)})
    assert found.flops == pytest.approx((2 * 0.25 * 1 + 0.25 * 2) * 10 * 2 * 1024**3)
    assert found.seconds == pytest.approx(10 * max(2 * PRODUCT, PRODUCT + SUM), rel=1e-4)
    assert found.transfers[0].times == pytest.approx(2.5)


def test_of_operations_that_a_stage_looks_up_the_longest_is_waited_for():
    """Two products on a third of the ticks, one on half of them: all stages wait for two, and compute 2/3 + 1/2."""
    product = DOT.format("%y")
    text = program(
        *(
            f"%{name} = f32[1024,1024]{{1,0}} while(%{of}), condition=%if, body=%{name}_turn,"
            f' metadata={{op_name="jit(step)/of_some_stages/stage_{name}_0/while"}}'
            for name, of in (("forward", "p"), ("backward", "forward"))
        ),
        "ROOT %r = f32[1024,1024]{1,0} add(%backward, %backward)",
        before=f"""
%if (c: f32[1024,1024]) -> pred[] {{
  %c = f32[1024,1024]{{1,0}} parameter(0)
  ROOT %yes = pred[] constant(true)
}}
%forward_turn (y: f32[1024,1024]) -> f32[1024,1024] {{
  %y = f32[1024,1024]{{1,0}} parameter(0)
  ROOT %d = f32[1024,1024]{{1,0}} {product}
}}
%backward_turn (y: f32[1024,1024]) -> f32[1024,1024] {{
  %y = f32[1024,1024]{{1,0}} parameter(0)
  %d = f32[1024,1024]{{1,0}} {product}
  ROOT %e = f32[1024,1024]{{1,0}} {DOT.format("%d")}
}}""",
    )
    taken = {"stage_forward_0": Taken(1 / 2, 1.0), "stage_backward_0": Taken(1 / 3, 1.0)}
    found = estimate(text, mesh(), GPU, taken=taken)
    assert found.seconds == pytest.approx(2 * PRODUCT, rel=1e-4)
    assert found.flops == pytest.approx((1 / 2 + 2 / 3) * 2 * 1024**3)
