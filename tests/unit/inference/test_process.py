"""The engine's process: its pipe may be full, and the event loop goes on."""

import asyncio
import os
import signal
import time
from typing import Any

import pytest
import torch

import treadle
from treadle.errors import ConfigError
from treadle.inference.engine import Engine, EngineConfig
from treadle.inference.process import EngineDied, EngineProcess
from treadle.inference.request import Sampling


def tiny_engine() -> Engine:
    torch.set_num_threads(1)
    layer = {"kind": "pre_norm", "mixer": {"kind": "attention", "heads": 2}, "feedforward": {"kind": "gated", "dim": 8}}
    model = treadle.build({"dim": 8, "vocab_size": 32, "max_length": 64, "layers": [layer]})
    return Engine(model, EngineConfig(slots=4, page=8, cache_tokens=256))


async def refusal(engine: EngineProcess, prompt: list[int]) -> Exception:
    try:
        async for _ in engine.generate(prompt, Sampling(max_tokens=1)):
            raise AssertionError("the prompt is too long to be taken")
    except (ConfigError, EngineDied) as error:
        return error
    raise AssertionError("it ended without a word")


def test_an_engine_that_does_not_read_keeps_nobody_waiting() -> None:
    async def run() -> None:
        engine = EngineProcess(tiny_engine)
        try:
            assert await engine.start() == 64
            pid = int(engine._process.pid or 0)
            os.kill(pid, signal.SIGSTOP)
            begin = time.perf_counter()
            tasks = [asyncio.create_task(refusal(engine, [1] * 100_000)) for _ in range(8)]  # more than a pipe holds
            await asyncio.sleep(0.05)
            assert time.perf_counter() - begin < 5
            assert not any(task.done() for task in tasks)
            os.kill(pid, signal.SIGCONT)
            found: list[Any] = await asyncio.wait_for(asyncio.gather(*tasks), 30)
            assert all("max_length=64" in str(error) for error in found)
            engine.stop()
            for _ in range(100):
                await asyncio.sleep(0.05)
                if engine.error:
                    break
            with pytest.raises(EngineDied, match="code -9"):
                raise await asyncio.wait_for(refusal(engine, [1]), 10)
        finally:
            engine.stop()

    asyncio.run(run())


def test_vectors_do_not_arrive_as_open_files() -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def vector(engine: EngineProcess) -> Any:
        asked = Sampling(max_tokens=0, temperature=0, pooling="mean")
        return [update.pooled async for update in engine.generate([1, 2, 3], asked)][-1]

    async def run() -> None:
        engine = EngineProcess(tiny_engine)
        try:
            await engine.start()
            before = files()
            kept = await asyncio.wait_for(asyncio.gather(*(vector(engine) for _ in range(64))), 30)
            assert files() < before + 16
            assert {vector.shape for vector in kept} == {(8,)}
        finally:
            engine.stop()

    asyncio.run(run())
