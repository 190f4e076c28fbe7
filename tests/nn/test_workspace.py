from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import randomise_bn

from gplws.models import GPLWSNet
from gplws.nn import Workspace, WorkspacePool


def test_memory_given_back_is_taken_again():
    workspace, like = Workspace(), torch.empty(0)
    first = workspace.take((3, 4), like)
    second = workspace.take((3, 4), like)
    assert first.data_ptr() != second.data_ptr() and first.is_contiguous()
    workspace.give_back(first)
    assert workspace.take((2, 5), like).data_ptr() == first.data_ptr()


def test_the_smallest_memory_that_fits_is_taken():
    workspace, like = Workspace(), torch.empty(0)
    large, small = workspace.take((100,), like), workspace.take((10,), like)
    workspace.give_back(large)
    workspace.give_back(small)
    assert workspace.take((8,), like).data_ptr() == small.data_ptr()
    assert workspace.take((9,), like).data_ptr() == large.data_ptr()


def test_dtypes_share_memory_and_foreign_tensors_are_left_alone():
    workspace = Workspace()
    first = workspace.take((8,), torch.empty(0))
    workspace.give_back(torch.empty(8))
    workspace.give_back(first)
    half = workspace.take((16,), torch.empty(0, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.data_ptr() == first.data_ptr()


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
