"""Numbers that are none fail the request that has them, and do not live on in pages."""

import asyncio

import pytest
import torch

from service.engine.events import FaultKind
from service.errors import GenerationError
from tests.service.engine.driving import collect, prompt_of, request, run, wait_until
from tests.service.engine.faults.injection import knobs_of, same


def test_logits_that_are_not_numbers_fail_their_own_request_only(engine, monkeypatch):
    original = engine.runner.run

    def poison(chunks):
        logits, completed = original(chunks)
        logits = logits.clone()
        for row, sequence in enumerate(completed):
            if sequence.prompt_ids[0] == 99:
                logits[row] = float("nan")
        return logits, completed

    monkeypatch.setattr(engine.runner, "run", poison)

    async def both():
        return await asyncio.gather(
            collect(engine, request([99, 5, 6])),
            collect(engine, request([98, 5, 6])),
            return_exceptions=True,
        )

    failed, fine = asyncio.run(both())
    assert isinstance(failed, GenerationError)
    assert len(fine[0][0]) == 8


def poison(engine, monkeypatch, prompt_start):
    """Make everything that is computed for prompts of this first token not a number."""
    embed = engine.runner._model.get_input_embeddings()

    def spoil(_module, args, output):
        ids = args[0]
        is_bad = (ids == prompt_start).cumsum(-1) > 0
        return torch.where(is_bad[..., None], torch.nan, output)

    return embed.register_forward_hook(spoil)


@pytest.mark.parametrize("method", ["dense", "quest", "snapkv", "flash_skip_softmax", "streaming"])
def test_numbers_that_are_none_do_not_live_on_in_the_pages(engine, monkeypatch, method):
    following = [
        request(prompt_of(n, seed=n), method, knobs_of(method), max_tokens=12)
        for n in (5, 130, 250)
    ]
    expected = [run(engine, one)[0] for one in following]
    hook = poison(engine, monkeypatch, 99)
    with pytest.raises(GenerationError, match="not a number"):
        run(engine, request([99, *prompt_of(1000)], method, knobs_of(method)))
    hook.remove()
    assert engine.events.kinds == [FaultKind.NUMBERS]
    wait_until(lambda: engine.status().num_pages_used == 0)
    for one, alone in zip(following, expected, strict=True):
        same(run(engine, one)[0], alone)
