"""Collectives read from HLO: kinds, axes, trip counts, bytes."""

import pytest

from benchmarks.collectives import find_collectives
from benchmarks.links import Links

MESH = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
HLO = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%part (p0: f32[64,32], p1: s32[]) -> f32[16,32] {
  %p0 = f32[64,32]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %same = f32[64,32]{1,0} bitcast(%p0)
  ROOT %slice = f32[16,32]{1,0} dynamic-slice(%same, %p1, %p1), dynamic_slice_sizes={16,32}
}

%body (state: (s32[], f32[16,32])) -> (s32[], f32[16,32]) {
  %state = (s32[], f32[16,32]{1,0}) parameter(0)
  %own = f32[16,32]{1,0} get-tuple-element(%state), index=1
  %i = s32[] get-tuple-element(%state), index=0
  %whole = f32[64,32]{1,0} all-gather(%own), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %pair = (f32[64,32]{1,0}, f32[32]{0}) all-reduce(%whole, %scale), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %gradient = f32[64,32]{1,0} get-tuple-element(%pair), index=0
  %scale_gradient = f32[32]{0} get-tuple-element(%pair), index=1
  %mine = f32[16,32]{1,0} fusion(%gradient, %i), kind=kLoop, calls=%part
  ROOT %next = (s32[], f32[16,32]{1,0}) tuple(%i, %mine)
}

%condition (state: (s32[], f32[16,32])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b)
}

ENTRY %main (x: f32[16,32]) -> f32[16,32] {
  %x = f32[16,32]{1,0} parameter(0)
  %loop = (s32[], f32[16,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %lone = f32[8]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %pairs = bf16[8,4]{1,0} all-reduce(%z), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add, metadata={op_name="dot"}
  %shift = s32[8]{0} collective-permute(%w), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  ROOT %out = f32[16,32]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_what_is_in_a_program():
    found = find_collectives(HLO, MESH)
    assert [(c.kind, c.axes, c.group_size, c.times, c.sliced) for c in found] == [
        ("all-gather", ("fsdp",), 4, 5, False),
        ("all-reduce", ("fsdp",), 4, 5, True),  # of each device's reader only a quarter is read
        ("all-reduce", ("fsdp",), 4, 5, False),
        ("all-reduce", ("tensor",), 2, 1, False),
        ("collective-permute", ("fsdp",), 2, 1, False),
    ]
    assert [c.result_bytes for c in found] == [8192, 8192, 128, 64, 32]
    assert [c.link_bytes for c in found] == [0.75 * 8192, 0.75 * 8192, 1.5 * 128, 64, 32]
    assert found[3].name == "dot"


def test_groups_that_are_not_understood_are_an_error():
    with pytest.raises(ValueError, match="no replica groups found"):
        find_collectives(HLO.replace("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "groups=?"), MESH)
    with pytest.raises(ValueError, match="no entry computation"):
        find_collectives("HloModule x", MESH)


def test_links_inside_and_between_machines():
    links = Links(nvlink=400.0, infiniband=50.0, nvlink_latency=1.0, infiniband_latency=10.0, devices_per_machine=4)
    gather, sliced, _, pairs, _ = find_collectives(HLO, MESH)
    # fsdp spans both machines, two members in each: two adapters.
    assert links.seconds(gather, MESH) == pytest.approx(0.75 * 8192 / 100 + 2 * 10)
    assert links.seconds(sliced, MESH) == links.seconds(gather, MESH)
    assert links.seconds(pairs, MESH) == pytest.approx(64 / 400 + 1)
    wide = {"data": 1, "fsdp": 4, "tensor": 8, "context": 1}  # now each member has a machine to itself
    assert links.seconds(gather, wide) == pytest.approx(0.75 * 8192 / 50 + 2 * 10)
