"""What XLA says is alive at the peak, read from a report as it writes them."""

# SPDX-License-Identifier: Apache-2.0
from megajax.parallel.live_memory import live_at_peak

REPORT = """HloLiveRange (max 6):
  InstructionSequence:
    0:p
    1:zeros
    2:c
    3:made
    4:n
    5:w
  BufferLiveRange:
    p{}:0-6
    made{}:3-4
  Live ranges at 3 (peak):
    p{}: 4194304 bytes (cumulative: 4194304 bytes)
    made{}: 2097152 bytes (cumulative: 6291456 bytes)
    c{1}: 8388608 bytes (cumulative: 14680064 bytes)
  Stack trace breakdown for peak usage: 14 680 064 bytes
    made{}: 1 bytes
"""

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4194304, parameter 0, shape |f32[1024,1024]| at ShapeIndex {}:
 value: <7 p @0> (size=4194304,offset=0): f32[1024,1024]{1,0}
allocation 1: size 10485760, preallocated-temp:
 value: <8 c{1} @0> (size=8388608,offset=0): f32[2,1024,1024]{2,1,0}
 value: <9 made @0> (size=2097152,offset=8388608): bf16[1024,1024]{1,0}
"""

TEXT = """HloModule test
%body (c: (s32[], f32[2,1024,1024])) -> (s32[], f32[2,1024,1024]) {
  %c = (s32[], f32[2,1024,1024]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %made = bf16[1024,1024]{1,0} broadcast(%i), dimensions={}, metadata={op_name="jit(step)/layer/mlp"}
  %n = f32[2,1024,1024]{2,1,0} get-tuple-element(%c), index=1
  ROOT %t = (s32[], f32[2,1024,1024]{2,1,0}) tuple(%i, %n)
}
%cond (d: (s32[], f32[2,1024,1024])) -> pred[] {
  %d = (s32[], f32[2,1024,1024]{2,1,0}) parameter(0)
  ROOT %k = pred[] constant(true)
}
ENTRY %main (p: f32[1024,1024]) -> f32[2,1024,1024] {
  %p = f32[1024,1024]{1,0} parameter(0), metadata={op_name="state.params"}
  %zeros = f32[2,1024,1024]{2,1,0} broadcast(%p), dimensions={1,2}
  %zero = s32[] constant(0)
  %init = (s32[], f32[2,1024,1024]{2,1,0}) tuple(%zero, %zeros)
  %w = (s32[], f32[2,1024,1024]{2,1,0}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[2,1024,1024]{2,1,0} get-tuple-element(%w), index=1
}
"""


def test_buffers_at_the_peak():
    carried, argument, working = live_at_peak(REPORT, ASSIGNMENT, TEXT)
    assert (carried.name, carried.size, carried.dtype, carried.shape) == ("c", 8388608, "f32", (2, 1024, 1024))
    assert not carried.argument and not carried.local, "what a loop carries waits for what comes after"
    assert argument.argument and argument.op_name == "state.params"
    assert working.local and working.op_name == "jit(step)/layer/mlp"


def test_a_report_without_a_peak():
    assert live_at_peak("", "", TEXT) == ()
