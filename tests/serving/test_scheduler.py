"""Jobs through an engine that does as it is told: order, places, cancelling, failing, closing."""

import asyncio
from unittest import mock

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.request import Request
from flexolmo_jax.serving.scheduler import Scheduler
from flexolmo_jax.serving.schema import ApiError


def requests(*first_tokens, tokens=3):
    return [Request((token,), max_new_tokens=tokens) for token in first_tokens]


@pytest.fixture
def scheduler(engine):
    scheduler = Scheduler(lambda: engine, queue=4)
    yield scheduler
    engine.gate.set()
    scheduler.close()
    scheduler.join()


async def collect(job):
    """The text of each request of a job."""
    texts = [""] * len(job.requests)
    async for index, update in job:
        texts[index] += update.text
    return texts


def run(main):
    """Runs a test on an event loop, for so long at most."""
    return asyncio.run(asyncio.wait_for(main(), 600))


async def until(condition):
    """Waits for what another thread does."""
    while not condition():
        await asyncio.sleep(0.001)


def test_more_requests_than_slots_take_turns_in_order(engine, scheduler):
    async def main():
        engine.gate.clear()
        jobs = [scheduler.submit(requests(1))]
        await until(lambda: scheduler.load == {"running": 1, "waiting": 0})
        jobs += [scheduler.submit(requests(2, 3, tokens=2)), scheduler.submit(requests(4, tokens=1))]
        assert scheduler.load == {"running": 1, "waiting": 3}
        engine.gate.set()
        return await asyncio.gather(*map(collect, jobs))

    assert run(main) == [["xxx"], ["xx", "xx"], ["x"]]
    assert engine.entered == [1, 2, 3, 4]
    assert engine.most == 2
    assert scheduler.load == {"running": 0, "waiting": 0}


def test_a_full_queue_refuses_and_takes_again_once_there_is_room(engine, scheduler):
    async def main():
        engine.gate.clear()
        running = scheduler.submit(requests(1, 2))
        await until(lambda: scheduler.load == {"running": 2, "waiting": 0})
        waiting = scheduler.submit(requests(3, 4, 5))
        with pytest.raises(ApiError, match="3 of 4 places are taken") as caught:
            scheduler.submit(requests(6, 7))
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        last = scheduler.submit(requests(6))
        engine.gate.set()
        assert await collect(last) == ["xxx"]
        assert await collect(running) == await collect(scheduler.submit(requests(7, 8))) == ["xxx", "xxx"]
        assert await collect(waiting) == ["xxx"] * 3

    run(main)


def test_a_cancelled_job_leaves_the_engine_and_the_queue(engine, scheduler):
    async def main():
        engine.gate.clear()
        job = scheduler.submit(requests(1, 2, 3))
        await until(lambda: scheduler.load == {"running": 2, "waiting": 1})
        job.cancel()
        assert scheduler.load["waiting"] == 0
        other = scheduler.submit(requests(4))
        engine.gate.set()
        assert await collect(other) == ["xxx"]

    run(main)
    assert engine.cancelled == [0, 1]
    assert engine.entered == [1, 2, 4]


def test_cancelling_what_has_ended_does_nothing(engine, scheduler):
    async def main():
        job = scheduler.submit(requests(1))
        await collect(job)
        job.cancel()
        return await collect(scheduler.submit(requests(2)))

    assert run(main) == ["xxx"]
    assert engine.cancelled == []


@pytest.mark.parametrize("method", ["step", "add"])
def test_an_engine_that_fails_is_replaced_and_only_what_was_in_it_fails(engine, method, caplog):
    engines = [engine, type(engine)()]
    made = iter(engines)
    scheduler = Scheduler(lambda: next(made), queue=4)

    def broken(*_):
        assert engine.gate.wait(600)
        raise RuntimeError("out of memory, in secret places")

    async def main():
        engine.gate.clear()
        setattr(engine, method, broken)
        failing = [scheduler.submit(requests(1, 2, 3)), scheduler.submit(requests(4))]
        await until(lambda: scheduler.load == {"running": 2, "waiting": 2})
        engine.gate.set()
        with pytest.raises(ApiError) as caught:
            await collect(failing[0])
        assert await collect(failing[1]) == ["xxx"]
        return caught.value

    error = run(main)
    scheduler.close()
    scheduler.join()
    assert error.status == 500
    assert "secret" not in error.message
    assert "secret" in caplog.text
    assert engines[1].entered == [4]


def test_closing_breaks_off_every_job_at_once(engine, scheduler):
    async def main():
        engine.gate.clear()
        jobs = [scheduler.submit(requests(1, 2)), scheduler.submit(requests(3))]
        await until(lambda: scheduler.load == {"running": 2, "waiting": 1})
        scheduler.close()
        for job in jobs:
            with pytest.raises(ApiError, match="shutting down") as caught:
                await collect(job)
            assert caught.value.status == 503
        with pytest.raises(ApiError, match="shutting down"):
            scheduler.submit(requests(4))

    run(main)
    engine.gate.set()
    scheduler.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_cannot_be_made_again_closes(engine):
    made = iter([engine])
    scheduler = Scheduler(lambda: next(made), queue=4)
    engine.error = RuntimeError("broken")

    async def main():
        with pytest.raises(ApiError):
            await collect(scheduler.submit(requests(1)))

    run(main)
    scheduler.join()
    assert scheduler.closed


def test_requests_that_the_engine_refuses_disturb_nobody(engine, scheduler):
    async def main():
        engine.gate.clear()
        running = scheduler.submit(requests(1))
        await until(lambda: scheduler.load == {"running": 1, "waiting": 0})
        add, engine.add = engine.add, mock.Mock(side_effect=UserError("too long"))
        refused = scheduler.submit(requests(2))
        engine.gate.set()
        with pytest.raises(ApiError, match=r"^too long$") as caught:
            await collect(refused)
        engine.add = add
        return caught.value.status, await collect(running), await collect(scheduler.submit(requests(3, tokens=1)))

    assert run(main) == (400, ["xxx"], ["x"])
