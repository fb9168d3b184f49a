"""What makes a host wait, read off the text of a compiled program."""

import pytest

from experiments.study.host_waits import BRANCH, CALLBACK, LOOP, RAGGED, host_waits, replica_groups, summary

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %r = (s32[], f32[8]{0}) conditional(%i, %p, %p), branch_computations={%a, %b}, metadata={op_name="jit(step)/rounds/cond"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %known = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"8"},"known_init_step":{"init":"0","step":"1"}}
  %open = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body, metadata={op_name="jit(step)/while"}
  %in = u32[8]{0:S(7)} ragged-all-to-all(%x, %o, %a, %b, %c, /*index=5*/%d), replica_groups={{0,1},{2,3}}
  %out = u32[8]{0:S(7)} ragged-all-to-all(%x, %o, %a, %b, %c, /*index=5*/%d), replica_groups={{0,2},{1,3}}, metadata={op_name="jit(step)/dispatch"}
  %start = ((u32[8]{0}), u32[8]{0}) ragged-all-to-all-start(%x, %o, %a, %b, %c, %d), replica_groups=[2,2]<=[2,2]T(1,0), metadata={op_name="jit(step)/dispatch"}
  %dense = u32[8]{0} all-to-all(%x), replica_groups={{0,2},{1,3}}
  ROOT %said = f32[8]{0} custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback", metadata={op_name="jit(step)/print"}
}
"""


def test_what_waits_and_what_does_not():
    found = host_waits(PROGRAM, per_host=2)
    assert [(w.kind, w.op_name) for w in found] == [
        (BRANCH, "jit(step)/rounds/cond"),
        (LOOP, "jit(step)/while"),
        (RAGGED, "jit(step)/dispatch"),
        (RAGGED, "jit(step)/dispatch"),
        (CALLBACK, "jit(step)/print"),
    ]
    assert "2 x ragged exchange over hosts: jit(step)/dispatch" in summary(found)
    assert [w.kind for w in host_waits(PROGRAM, per_host=4)] == [BRANCH, LOOP, CALLBACK]
    assert summary([]) == "  nothing waits for the host"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,4},{1,5}}, x={1}", [[0, 4], [1, 5]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['data'=1,'node'=2,'local'=2] {'node'}, x={1}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['node'=2,'local'=2,'tensor'=1] {'local','tensor'}", [[0, 1], [2, 3]]),
        ("dimensions={0}", []),
    ],
)
def test_groups_of_devices(text, groups):
    assert replica_groups(text) == groups
