"""A snapshot holds what was counted when it was taken, whatever is counted later."""

import torch

from service.engine.counter_snapshot import CounterSnapshot


def test_what_is_counted_later_does_not_show():
    blocks = torch.arange(24).view(2, 4, 3)
    elements = torch.arange(16).view(2, 4, 2)
    snapshot = CounterSnapshot([blocks, elements])
    snapshot.take()
    expected = [blocks[:, 1:3].clone(), elements[:, 1:3].clone()]
    blocks += 100
    elements += 100
    given = snapshot.read(slice(1, 3))
    assert all(map(torch.equal, given, expected))
    snapshot.take()
    assert torch.equal(snapshot.read(slice(1, 3))[0], expected[0] + 100)
    assert all(map(torch.equal, given, expected)), "what was read changes no more"
