import torch

from gplws.models.prediction import index_of


def test_frame_numbers_of_depths_are_linear_between_positions_and_beyond():
    positions = torch.tensor([[0.0, 1, 3], [6, 2, 0]])
    depth = torch.tensor([[[-1.0, 0.5, 2, 5]], [[7.0, 4, 1, -1]]], dtype=torch.float64)
    expected = torch.tensor([[[-1.0, 0.5, 1.5, 2]], [[-0.25, 0.5, 1.5, 2.5]]]).double()
    torch.testing.assert_close(index_of(depth, positions.double())[1], expected[1])
    assert index_of(depth, positions.double())[0, 0, :3].tolist() == [-1, 0.5, 1.5]
    assert index_of(depth, positions.double())[0, 0, 3] == 3
    torch.autograd.gradcheck(lambda d: index_of(d, positions.double()), depth.requires_grad_())
