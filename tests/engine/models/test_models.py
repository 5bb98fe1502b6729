"""Every architecture against transformers: whatever the schedule and the pages, the logits are those of the formula."""

import pytest
import torch

from tests.engine.models.oracle import (
    PAGE_SIZE,
    TIMES_NOISE,
    GivenCache,
    Session,
    World,
    exact_copy,
    make_world,
    with_chunk,
    without_logits,
    write_checkpoint,
)
from tests.engine.models.variants import variants
from tests.tolerance import assert_within


@pytest.fixture(scope="module", params=sorted(variants()))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Each checkpoint is written, loaded and answered for once; the tests below share it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = variants()[request.param]
    theirs = write_checkpoint(folder, config)
    return make_world(folder, theirs, exact_copy(theirs, config))


CHUNKS = [[37], [1] * 37, [5] * 7 + [2], [16, 16, 5], [20] + [1] * 17]


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "token by token", "by 5", "by pages", "prompt, then decode"])
def test_alone(world: World, chunks: list[int]) -> None:
    """However a prompt is cut, every row's logits are those of the whole."""
    session, answers = Session(world), world.answers[0]
    logits = session.run(answers.token_ids, session.table(37), chunks)
    assert_within(logits, answers.logits, answers.bound, "logits")


def test_together(world: World) -> None:
    """A prompt in chunks beside one that decodes, then beside another prompt; rows of one step never mix."""
    session = Session(world)
    long, short = world.answers
    tables = [session.table(37), session.table(23), session.table(23)]
    session.run(short.token_ids, tables[1], [20])
    for start, chunk, decoded in ((0, 13, 20), (13, 6, 21), (19, 1, 22)):
        rows = [with_chunk(short, decoded, 1, tables[1]), with_chunk(long, start, chunk, tables[0])]
        logits = session.step(*rows)
        assert_within(logits[:1], short.logits[decoded : decoded + 1], short.bound, "decoding row")
        assert_within(logits[1:], long.logits[start : start + chunk], long.bound, "prompt rows")
    logits = session.step(with_chunk(long, 20, 17, tables[0]), with_chunk(short, 0, 23, tables[2]))
    assert_within(logits[:17], long.logits[20:], long.bound, "last rows")
    assert_within(logits[17:], short.logits, short.bound, "the other prompt")


def test_reused_pages(world: World) -> None:
    """A prefix found in the cache: its pages are read by a second sequence, which starts after them on pages that
    another has used and left its numbers in."""
    session, answers = Session(world), world.answers[0]
    first, left = session.table(37), session.table(37)
    session.run(answers.token_ids, first, [37])
    session.run(list(reversed(answers.token_ids)), left, [37])
    session.release(left)
    second = first[:2] + session.table(37 - 2 * PAGE_SIZE)
    logits = session.run(answers.token_ids, second, [3, 2], start=2 * PAGE_SIZE)
    assert_within(logits, answers.logits[2 * PAGE_SIZE :], answers.bound, "logits after a cached prefix")


def test_only_wanted_logits_are_computed(world: World) -> None:
    """An unfinished prompt wants none, a finished one its last, in the order of the rows."""
    session = Session(world)
    long, short = world.answers
    tables = session.table(37), session.table(23)
    unfinished = without_logits(with_chunk(long, 0, 30, tables[0]), 0)
    whole = without_logits(with_chunk(short, 0, 23, tables[1]), 1)
    assert session.step(unfinished).shape == (0, world.served.config.vocab_size)
    assert_within(session.step(unfinished, whole), short.logits[-1:], short.bound, "last row")


@pytest.mark.parametrize("chunks", [[37], [16, 9, 1, 1, 10]], ids=["whole", "chunks"])
@torch.no_grad()
def test_float16_pages(world: World, chunks: list[int]) -> None:
    """The same formula with keys and values rounded to float16 once.

    Keys and values must be the rounding of the exact ones, give or take float32 noise; logits must be those of the
    oracle when it reads our pages.
    """
    session, answers = Session(world, "f16"), world.answers[0]
    table = session.table(37)
    logits = session.run(answers.token_ids, table, chunks)
    stored = session.stored(table, 37)
    caches = GivenCache(stored), GivenCache(stored)
    ids = torch.tensor([answers.token_ids])
    expected = world.theirs_exact(ids, past_key_values=caches[0]).logits[0]
    noise = (world.theirs(ids, past_key_values=caches[1]).logits[0].double() - expected).abs().max()
    assert_within(logits, expected, float(TIMES_NOISE * noise), "logits over float16 pages")
    for layer, (found, wanted, theirs) in enumerate(zip(stored, caches[0].wanted, caches[1].wanted, strict=True)):
        slack = TIMES_NOISE * (theirs.double() - wanted).abs().max()
        lowest, highest = (wanted - slack).half(), (wanted + slack).half()
        assert bool(((lowest <= found) & (found <= highest)).all()), f"layer {layer} stores other keys or values"
