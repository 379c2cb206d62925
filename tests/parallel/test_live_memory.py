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
    zeros{}:1-2
    c{1}:2-5
    made{}:3-4
    late{}:5-6
  Live ranges at 1 (peak):
    zeros{}: 8388608 bytes (cumulative: 8388608 bytes)
"""

ASSIGNMENT = """BufferAssignment:
allocation 0: size 4194304, parameter 0, shape |f32[1024,1024]| at ShapeIndex {}:
 value: <7 p @0> (size=4194304,offset=0): f32[1024,1024]{1,0}
allocation 1: size 10485760, preallocated-temp:
 value: <6 zeros @0> (size=8388608,offset=0): f32[2,1024,1024]{2,1,0}
 value: <8 c{1} (phi) @0> (size=8388608,offset=0): f32[2,1024,1024]{2,1,0}
 value: <9 made @0> (size=2097152,offset=8388608): bf16[1024,1024]{1,0}
 value: <10 late @0> (size=1048576,offset=8388608): u8[1048576]{0}
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
  %zeros = f32[2,1024,1024]{2,1,0} broadcast(%p), dimensions={1,2}, metadata={op_name="jit(step)/sums"}
  %zero = s32[] constant(0)
  %init = (s32[], f32[2,1024,1024]{2,1,0}) tuple(%zero, %zeros)
  %w = (s32[], f32[2,1024,1024]{2,1,0}) while(%init), condition=%cond, body=%body
  ROOT %r = f32[2,1024,1024]{2,1,0} get-tuple-element(%w), index=1
}
"""


def test_buffers_at_the_peak():
    carried, working = live_at_peak(REPORT, ASSIGNMENT, TEXT)
    assert (carried.size, carried.dtype, carried.shape) == (8388608, "f32", (2, 1024, 1024))
    assert not carried.local, "what a loop carries waits for what comes after"
    assert carried.op_name == "jit(step)/sums", "what was written there last"
    assert (working.size, working.dtype, working.shape) == (2097152, "bf16", (1024, 1024))
    assert working.local and working.op_name == "jit(step)/layer/mlp"


def test_bytes_that_values_share_count_once():
    shared = ASSIGNMENT.replace("offset=8388608): bf16", "offset=7340032): bf16")
    sizes = [buffer.size for buffer in live_at_peak(REPORT, shared, TEXT)]
    assert sizes == [8388608, 1048576]


def test_a_report_of_nothing():
    assert live_at_peak("", "", TEXT) == ()
