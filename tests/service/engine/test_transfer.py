"""What is moved arrives as it was; on a CPU there is nothing to wait for."""

import torch

from service.engine.transfer import Landmark, to_device, to_host

CPU = torch.device("cpu")


def test_lists_and_tensors_arrive_with_their_type():
    assert to_device([1, 2], CPU).tolist() == [1, 2]
    assert to_device([[1.5]], CPU, torch.float64).dtype == torch.float64
    assert to_device([], CPU, torch.int64).dtype == torch.int64
    assert to_device([True, False], CPU).dtype == torch.bool
    page_table = torch.arange(12).view(3, 4)
    assert torch.equal(to_device(page_table[1, :2], CPU), page_table[1, :2])
    assert to_host(torch.tensor([7])).tolist() == [7]


def test_a_landmark_on_a_cpu_is_reached_at_once():
    Landmark(CPU).wait()
