"""How many may be inside."""

import pytest

from server.errors import InvalidRequest, Unavailable
from server.generation import Generation
from tests.fakes import FakeEngine, Script
from tests.server.test_generation import job, run, service

pytestmark = pytest.mark.anyio


async def test_full_house_is_refused_and_a_place_is_given_back() -> None:
    """Bug: an unbounded queue; or places that are never returned, and a server that refuses for ever."""
    hall = service(FakeEngine(lambda submit: Script(hang=True)), max_queued_requests=1)
    inside = [Generation(hall, [job(id=str(i))]) for i in range(5)]  # the plan runs 4, and 1 may wait
    for generation in inside:
        await generation.__aenter__()
    with pytest.raises(Unavailable) as error:
        await run(Generation(hall, [job(id="late")]))
    assert error.value.headers["Retry-After"] == "1"
    await inside[0].__aexit__(None, None, None)
    with pytest.raises(Unavailable):  # a batch takes a place for each prompt
        await run(Generation(hall, [job(id="later"), job(id="too many")]))
    async with Generation(hall, [job(id="later")]):
        pass
    for generation in inside[1:]:
        await generation.__aexit__(None, None, None)
    assert hall.in_flight == 0


async def test_batches_that_can_never_be_admitted_are_not_asked_to_retry() -> None:
    """Bug: 503 with Retry-After, for ever, on an idle server."""
    hall = service(FakeEngine(), max_queued_requests=1)
    with pytest.raises(InvalidRequest, match=r"6 prompts.* takes 5 at once .*--max-queued-requests") as error:
        await run(Generation(hall, [job(id=str(i)) for i in range(6)]))
    assert (error.value.status, error.value.param) == (400, "prompt")
