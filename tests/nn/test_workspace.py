from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomise_bn

from gplws.models import GPLWSNet
from gplws.nn.workspace import MemoryPlan, Recorder, Workspace, WorkspacePool


def plan_of(sizes: list[int], given_back: dict[int, list[int]]) -> MemoryPlan:
    """Plan of tensors of so many floats; after taking tensor k, those of ``given_back[k]`` go."""
    recorder, like = Recorder(), torch.empty(0)
    taken: list[torch.Tensor] = []
    for step, size in enumerate(sizes):
        taken.append(recorder.take((size,), like))
        for index in given_back.get(step, []):
            recorder.give_back(taken[index])
    return recorder.plan()


def test_tensors_share_memory_only_where_they_are_not_needed_at_the_same_time():
    # The first is given back once the second is there, so only the third may lie on it.
    plan = plan_of([64, 64, 64], {1: [0]})
    assert plan == MemoryPlan((0, 256, 0), 512)


def test_small_tensors_fill_the_place_of_a_large_one():
    plan = plan_of([160, 160, 80, 80, 160], {1: [0], 4: [1]})
    assert plan.size == 4 * (160 + 160 + 160) and plan.offsets[:2] == (0, 640)
    assert {plan.offsets[2], plan.offsets[3]} < {0, 320, 1280, 1600}


@settings(deadline=None)
@given(st.data())
def test_a_plan_never_lets_living_tensors_overlap(data):
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=12))
    ends = [data.draw(st.integers(i, len(sizes))) for i in range(len(sizes))]
    given_back = {step: [i for i, e in enumerate(ends) if e == step] for step in range(len(sizes))}
    plan = plan_of(sizes, given_back)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        if ends[i] >= j:  # i is still needed when j is taken
            first, second = sorted((i, j), key=lambda k: plan.offsets[k])
            assert plan.offsets[first] + 4 * sizes[first] <= plan.offsets[second]
    assert max(o + 4 * n for o, n in zip(plan.offsets, sizes, strict=True)) <= plan.size


def test_a_workspace_hands_out_its_block_as_planned_and_keeps_it():
    workspace, like = Workspace(), torch.empty(0)
    plan = plan_of([64, 64, 64], {1: [0]})
    addresses = []
    for _ in range(2):
        workspace.begin("a", lambda: plan)
        tensors = [workspace.take((4, 16), like) for _ in range(3)]
        assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in tensors)
        addresses.append([t.data_ptr() for t in tensors])
    assert addresses[0] == addresses[1]
    assert addresses[0][0] == addresses[0][2] != addresses[0][1]


def test_the_network_says_how_much_memory_it_takes():
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32))).fuse()
    stack = torch.rand(1, 1, 3, 128, 128)
    with torch.no_grad():
        model(stack)
    with model._workspaces.borrow() as workspace:
        planned = workspace._block.numel() / 4 / stack.numel()
    # Two tensors of the finest level is the least there can be.
    assert 2 * 4 <= planned < 2 * 4 + 0.1
    assert model.floats_per_voxel == pytest.approx(planned + 2, abs=0.1)


def test_a_pool_lends_each_workspace_to_one_user():
    pool = WorkspacePool()
    with pool.borrow() as first, pool.borrow() as second:
        assert first is not second
    with pool.borrow() as third:
        assert third is first or third is second
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        with other.borrow() as fresh:
            assert fresh is not third


def test_a_failed_pass_drops_its_workspace():
    pool = WorkspacePool()
    with pytest.raises(RuntimeError), pool.borrow() as failed:
        raise RuntimeError
    with pool.borrow() as fresh:
        assert fresh is not failed


@torch.no_grad()
def test_a_network_gives_the_same_in_used_memory_and_from_several_threads():
    model = randomise_bn(GPLWSNet(widths=(4, 8, 16, 32))).fuse()
    stacks = [torch.rand(1, 3, n, h, 24) for n, h in ((3, 40), (5, 17), (2, 64), (4, 8))]
    with torch.enable_grad():
        fresh = [model(stack).detach() for stack in stacks]
    results = [model(stack) for stack in stacks]
    assert all(torch.equal(r, f) for r, f in zip(results, fresh, strict=True))
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(model, stacks * 3))
    assert all(torch.equal(a, f) for a, f in zip(again, fresh * 3, strict=True))
    model.release_memory()
    assert torch.equal(model(stacks[0]), fresh[0])
