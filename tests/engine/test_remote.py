"""An engine in a process of its own: it answers, it dies, it comes back, it stops."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.client import EngineClient, EngineUnavailable, start_engine
from engine.config import EngineConfig
from engine.messages import Done, Event, Failed, Loading, Token
from engine.remote import ROOT, RemoteClient
from tests.engine.worlds import submit

WAIT_S = 60.0


async def follow(client: RemoteClient, request_id: str, max_tokens: int = 5) -> list[Event]:
    stream = client.submit(submit(request_id, [5, 6, 7], max_tokens=max_tokens, ignore_eos=True))
    events: list[Event] = []
    while not any(isinstance(event, Done | Failed) for event in events):
        events += await asyncio.wait_for(stream.next(), WAIT_S)
    return events


def state_of(client: RemoteClient) -> str:
    """A type checker takes a property that was compared once for a constant."""
    return client.state


def config_of(folder: Path) -> EngineConfig:
    return EngineConfig(str(folder), kv_memory=4 << 20, threads=1)


def test_loads_answers_dies_and_comes_back(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: requests that wait for ever on a dead process, or an engine that stays away after one crash; a log that
    tells of the death and never that it is over."""

    progress: list[Loading] = []

    async def scenario(client: EngineClient) -> None:
        assert isinstance(client, RemoteClient)
        with pytest.raises(EngineUnavailable, match="loading"):
            client.submit(submit("early", [1]))
        await client.start()
        ready = await asyncio.wait_for(client.wait_ready(), WAIT_S)
        assert progress
        assert progress[-1].done_bytes == progress[-1].total_bytes == ready.plan.weight_bytes
        first = await follow(client, "a")
        assert sum(isinstance(event, Token) for event in first) == 5

        dying = asyncio.create_task(follow(client, "b", max_tokens=1500))
        async with asyncio.timeout(WAIT_S):
            while client.stats.num_running == 0:
                await asyncio.sleep(0.01)
        assert client.process_id is not None
        os.kill(client.process_id, signal.SIGKILL)
        (failed,) = [event for event in await dying if isinstance(event, Failed)]
        assert failed.kind == "engine"
        assert "signal 9" in failed.message
        assert state_of(client) == "restarting"
        with pytest.raises(EngineUnavailable, match="signal 9"):
            client.submit(submit("c", [1]))
        assert "the engine is back" not in caplog.text
        await asyncio.wait_for(client.wait_ready(), WAIT_S)
        assert [record.getMessage() for record in caplog.records][-1] == "the engine is back and takes requests"
        assert [e for e in await follow(client, "a") if isinstance(e, Token)] == [
            e for e in first if isinstance(e, Token)
        ]
        await client.stop()
        assert state_of(client) == "stopped"

    with start_engine(config_of(tiny_checkpoint), progress.append) as client:
        asyncio.run(scenario(client))


def test_an_engine_loads_before_there_is_a_loop_and_ends_without_one(tiny_checkpoint: Path) -> None:
    """Bug: a second of imports after another in place of beside it; a process that outlives a server that could not
    read its tokenizer."""
    with start_engine(config_of(tiny_checkpoint)) as client:
        process_id = client.process_id
        assert process_id is not None
        os.kill(process_id, 0)  # it is there
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_stop_while_loading_does_not_wait(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: five seconds after Ctrl-C for a process that reads no messages yet."""

    async def scenario() -> None:
        client = RemoteClient(config_of(tiny_checkpoint))
        monkeypatch.setattr(client, "_send", pytest.fail)
        await client.start()
        while client.process_id is None:
            await asyncio.sleep(0.01)
        await client.stop()
        assert client.process_id is None

    asyncio.run(scenario())


def test_stop_ends_the_process_and_those_who_wait(tiny_checkpoint: Path) -> None:
    async def scenario() -> None:
        client = RemoteClient(config_of(tiny_checkpoint))
        await client.start()
        await asyncio.wait_for(client.wait_ready(), WAIT_S)
        process_id = client.process_id
        assert process_id is not None
        waiting = asyncio.create_task(follow(client, "a", max_tokens=1500))
        await asyncio.sleep(0.05)
        await client.stop()
        assert isinstance((await waiting)[-1], Failed)
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
        await client.stop()  # twice is fine

    asyncio.run(scenario())


def test_a_model_that_cannot_load_is_reported_and_not_tried_again(tmp_path: Path) -> None:
    """Bug: a restart loop over a checkpoint that will never load."""

    async def scenario() -> None:
        client = RemoteClient(config_of(tmp_path))
        await client.start()
        with pytest.raises(EngineUnavailable, match=r"config\.json"):
            await asyncio.wait_for(client.wait_ready(), WAIT_S)
        assert state_of(client) == "failed"
        await client.stop()

    asyncio.run(scenario())


def test_the_last_words_of_an_engine_wait_for_a_busy_server(tmp_path: Path) -> None:
    """Bug: "the engine process ended with code 0" where the tokenizer took longer to read than the model to fail."""

    async def scenario(client: EngineClient) -> None:
        await client.start()
        with pytest.raises(EngineUnavailable, match=r"config\.json"):
            await asyncio.wait_for(client.wait_ready(), WAIT_S)

    with start_engine(config_of(tmp_path)) as client:
        assert isinstance(client, RemoteClient)
        assert client._child is not None
        client._child.process.wait(WAIT_S)
        asyncio.run(scenario(client))


async def failure_of(client: RemoteClient) -> str:
    """Start an engine that cannot run; returns what those who wait are told."""
    await client.start()
    with pytest.raises(EngineUnavailable) as caught:
        await asyncio.wait_for(client.wait_ready(), WAIT_S)
    assert state_of(client) == "failed"
    await client.stop()
    return str(caught.value)


def test_a_process_that_dies_before_it_connects_is_noticed(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a server that waits for ever to hand its configuration to a process that is gone."""
    monkeypatch.setattr("engine.remote.sys.executable", shutil.which("false"))
    assert "ended with code 1" in asyncio.run(failure_of(RemoteClient(config_of(tiny_checkpoint))))


def test_no_room_for_a_socket_is_reported(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an exception in the task that watches the engine is seen by nobody, and everyone waits."""

    def full(prefix: str) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr("engine.remote.tempfile.mkdtemp", full)
    assert "no space left" in asyncio.run(failure_of(RemoteClient(config_of(tiny_checkpoint))))


def test_packages_of_the_current_folder_are_not_taken_for_ours(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a folder called engine, or a torch.py, where the user happens to stand."""
    for name in ("engine", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)

    async def scenario() -> None:
        client = RemoteClient(config_of(tiny_checkpoint))
        await client.start()
        await asyncio.wait_for(client.wait_ready(), WAIT_S)
        await client.stop()

    asyncio.run(scenario())


def test_an_engine_without_its_server_leaves(tmp_path: Path) -> None:
    """Bug: a process that outlives a killed server, holding a model's memory and deaf to SIGTERM."""
    code = "from engine.process import main; main()"
    settings = msgspec.json.encode(config_of(tmp_path)).decode()
    command = [sys.executable, "-c", code, f"ipc://{tmp_path}/nobody", "1", settings]  # process 1 is not its parent
    assert subprocess.run(command, timeout=WAIT_S, cwd=ROOT, check=False).returncode == 0


def test_cancelled_request_frees_its_pages_in_the_other_process(tiny_checkpoint: Path) -> None:
    async def scenario() -> None:
        client = RemoteClient(config_of(tiny_checkpoint))
        await client.start()
        await asyncio.wait_for(client.wait_ready(), WAIT_S)
        stream = client.submit(submit("a", [1] * 100, max_tokens=1000, ignore_eos=True))
        await asyncio.wait_for(stream.next(), WAIT_S)
        client.cancel("a")
        client.cancel("a")
        async with asyncio.timeout(WAIT_S):
            while client.stats.pages_used:
                await asyncio.sleep(0.01)
        await client.stop()

    asyncio.run(scenario())
