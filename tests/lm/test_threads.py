"""Threads that serve requests side by side on one model."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from unmix.lm import Add, LanguageModel

from .fakes import LinearCoder
from .families import raw_model, some_tokens


def test_threads_do_not_see_each_others_bindings() -> None:
    lm = LanguageModel(raw_model("llama").requires_grad_(False), "shared")
    lm.width("layers.1")  # now, so that its probe does not wait at the meeting
    one, two = LinearCoder("layers.1", 16), LinearCoder("layers.1", 16, seed=4)
    inputs = [some_tokens(2, 12, seed=s) for s in range(6)]
    # Every pass waits for the two others at layer 0, so that the three really are inside the model together.
    meeting = threading.Barrier(3, timeout=30)

    def meet(*_: object) -> None:
        meeting.wait()

    handle = lm.model.model.layers[0].register_forward_hook(meet)

    @torch.no_grad()
    def bound_run(coder: LinearCoder) -> list[torch.Tensor]:
        with lm.bind(coder) as bound:
            return [bound(x).logits for x in inputs]

    @torch.no_grad()
    def plain_run() -> list[torch.Tensor]:
        return [lm.logits(x) for x in inputs]

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(bound_run, one), pool.submit(bound_run, two), pool.submit(plain_run)]
        together = [job.result() for job in jobs]
    handle.remove()
    serial = [bound_run(one), bound_run(two), plain_run()]
    for left, right in zip(together, serial):
        for a, b in zip(left, right):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.allclose(serial[0][0], serial[1][0]) and not torch.allclose(serial[0][0], serial[2][0])


def test_tasks_of_one_event_loop_share_a_bound_model() -> None:
    lm = LanguageModel(raw_model("gpt2").requires_grad_(False), "shared")
    coder = LinearCoder("layers.1", 16)

    async def main() -> None:
        with lm.bind(coder) as bound, torch.no_grad():
            jobs = [asyncio.to_thread(bound, some_tokens(seed=s)) for s in range(4)]
            found = await asyncio.gather(*jobs)
            for s, out in enumerate(found):
                torch.testing.assert_close(out.logits, bound(some_tokens(seed=s)).logits)

    asyncio.run(main())


def test_threads_generate_from_one_bound_model_each_with_its_own_interventions() -> None:
    lm = LanguageModel(raw_model("llama").requires_grad_(False), "shared")
    acts = [[Add(latent=i, value=9.0, where="generated")] for i in range(4)]
    with lm.bind({"a": LinearCoder("layers.0", 16), "b": LinearCoder("layers.1", 16, seed=4)}, error="keep") as bound:

        def write(i: int) -> list[int]:
            own = [replace(act, coder="ab"[i % 2]) for act in acts[i]]
            options = {"temperature": 2.0, "seed": i, "stop_ids": (), "interventions": own}
            return bound.generate_tokens(some_tokens(1, 5, seed=i), 8, **options)[0].tolist()

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(write, range(4)))
        assert together == [write(i) for i in range(4)]
    assert torch.equal(lm.logits(some_tokens()), lm.model(input_ids=some_tokens()).logits)
