"""Loading, sleep and wake, draining and the engine's death, over real sockets with the fake engine."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest

from jdistill.sidecar import lifecycle as lifecycle_module
from jdistill.sidecar.engines import fake
from jdistill.wire import codec
from jdistill.wire.errors import EngineDeadError, UnavailableError
from jdistill.wire.types import ServerState
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.sidecar.services import (
    OFFLOAD,
    REFUSE,
    Gated,
    Req,
    control_failure,
    control_of,
    explain,
    failure,
    request,
    retry_delay_s,
    run,
    score,
    serving,
    until,
)


def test_a_dead_engine_is_unavailable_for_good():
    async def main():
        async with serving(die_on_token=13) as (service, _, channel):
            code, _, info, _ = await failure(channel, Req(sequence_lengths=[2], token_ids=[1, 13]))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert service.lifecycle.dead.is_set()
            code, _, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")

    run(main)


def test_a_draining_service_refuses_new_calls_and_can_fail_running_ones():
    async def main():
        async with serving(Gated) as (service, engine, channel):
            await service.lifecycle.refuse(UnavailableError("teacher 'tiny' is shutting down"))
            code, text, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert "shutting down" in text
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            info = await stub.GetServerInfo(teacher_pb2.GetServerInfoRequest())
            assert info.state == teacher_pb2.SERVER_STATE_DRAINING and info.models[0].model == "tiny"
            await service.lifecycle.serve(engine)
            running = asyncio.create_task(score(channel, request(*[5] * 10)))
            await until(lambda: engine.calls)
            service.open_calls.fail(UnavailableError("teacher 'tiny' has shut down before it finished"))
            with pytest.raises(grpc.aio.AioRpcError, match="before it finished"):
                await running
            assert engine.num_cancelled == 1

    run(main)


def test_sleep_and_wake_change_the_state_once_however_often_they_are_called():
    states = []

    async def main():
        async with serving(config=OFFLOAD, states=states) as (service, engine, channel):
            sleep, wake = control_of(channel)
            assert await wake() == ServerState.SERVING and engine.num_wakes == 0
            assert [await sleep(), await sleep()] == [ServerState.SLEEPING] * 2
            assert engine.asleep and engine.num_sleeps == 1 and service.lifecycle.state is ServerState.SLEEPING
            assert [await wake(), await wake()] == [ServerState.SERVING] * 2
            assert not engine.asleep and engine.num_wakes == 1
            assert await score(channel, request(5))

    run(main)
    assert states == [ServerState.SERVING, ServerState.SLEEPING, ServerState.SERVING]


def test_an_engine_that_cannot_sleep_is_unimplemented_and_garbage_is_an_invalid_argument():
    async def main():
        async with serving() as (service, _, channel):
            for call in control_of(channel):
                code, text, info, _ = await control_failure(call())
                assert (code, info.reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED") and "--offload" in text
            for method in ("Sleep", "Wake"):
                call = channel.unary_unary(f"/{codec.CONTROL_SERVICE}/{method}")(b"\xff\xff\xff garbage")
                code, text, _, _ = await control_failure(call)
                assert code == grpc.StatusCode.INVALID_ARGUMENT and f"not a jdistill.wire.v1.{method}Request" in text
            assert service.lifecycle.state is ServerState.SERVING and await score(channel, request(5))

    run(main)


def test_many_scores_that_arrive_in_sleep_wake_the_engine_once_and_are_answered():
    async def main():
        async with serving(config=OFFLOAD) as (service, engine, channel):
            sleep, _ = control_of(channel)
            await sleep()
            answers = await asyncio.gather(*(score(channel, request(5, seed=seed)) for seed in range(20)))
            assert all(len(chunks) == 1 for chunks in answers)
            assert (engine.num_wakes, service.lifecycle.state) == (1, ServerState.SERVING)

    run(main)


@pytest.mark.parametrize("config", [OFFLOAD, REFUSE], ids=["wake", "refuse"])
def test_sleep_waits_for_running_calls_and_waiting_calls_wake_it_or_are_refused(config):
    async def main():
        async with serving(Gated, config={**config, "max_running_tokens": 30}) as (service, engine, channel):
            sleep, wake = control_of(channel)
            running = asyncio.create_task(score(channel, request(10, 10, 10, 10)))
            await until(lambda: engine.calls)
            waiting = asyncio.create_task(score(channel, request(20)))
            await until(lambda: len(service.open_calls) == 2)
            asleep = asyncio.create_task(sleep())
            await until(lambda: service.lifecycle._falling_asleep)
            late = asyncio.create_task(score(channel, request(21)))
            if config is REFUSE:
                for call in (waiting, late):  # at once, not when the engine sleeps at last
                    with pytest.raises(grpc.aio.AioRpcError, match="asleep") as caught:
                        await call
                    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
                    assert retry_delay_s(caught.value) == lifecycle_module.ASLEEP_RETRY_S
            else:
                await until(lambda: len(service.open_calls) == 3)
            assert not asleep.done() and not engine.asleep
            engine.gate.set()
            assert sum(len(chunk.logprobs) for chunk in await running) == 36
            assert await asleep == ServerState.SLEEPING and engine.num_sleeps == 1
            if config is REFUSE:
                assert service.lifecycle.state is ServerState.SLEEPING
                with pytest.raises(grpc.aio.AioRpcError, match="asleep"):
                    await score(channel, request(5))
                assert engine.num_wakes == 0
                await wake()
                assert await score(channel, request(5))
            else:
                assert await waiting and await late
            assert (engine.num_sleeps, engine.num_wakes) == (1, 1)

    run(main)


def test_sleep_does_not_wait_for_a_client_that_reads_slowly():
    async def main():
        async with serving(config=OFFLOAD) as (service, engine, channel):
            message = request(*[1000] * 40, top_k=64)  # 20 MB, more than gRPC buffers
            call = teacher_pb2_grpc.TeacherServiceStub(channel).ScoreSequences(message)
            await call.read()
            await control_of(channel)[0]()
            assert engine.asleep and len(service.open_calls) == 1
            scored = 0
            while (chunk := await call.read()) is not grpc.aio.EOF:
                scored += len(chunk.logprobs)
            assert scored > 35 * 999

    run(main)


def test_a_client_that_gives_up_on_sleep_or_wake_leaves_no_engine_half_asleep():
    class Slow(fake.FakeEngine):
        def __init__(self, config):
            super().__init__(config)
            self.under_way, self.go_on = asyncio.Event(), asyncio.Event()

        async def sleep(self):
            self.asleep = True  # from now on nothing may be scored
            self.under_way.set()
            await self.go_on.wait()
            self.asleep = False
            await super().sleep()

        async def wake(self):
            await self.go_on.wait()
            await super().wake()

    async def main():
        async with serving(Slow, config=OFFLOAD) as (service, engine, channel):
            sleep, wake = control_of(channel)
            call = asyncio.create_task(sleep())
            await engine.under_way.wait()
            call.cancel()
            scoring = asyncio.create_task(score(channel, request(5)))
            await until(lambda: service.queue.queued_tokens)
            engine.go_on.set()
            assert await scoring
            await sleep()
            engine.go_on.clear()
            call = asyncio.create_task(wake())
            await until(service.lifecycle._transition.locked)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            engine.go_on.set()
            assert await score(channel, request(5))
            assert (engine.num_sleeps, engine.num_wakes) == (2, 2)

    run(main)


def test_sleep_wake_and_scores_may_race_and_no_score_meets_a_sleeping_engine():
    async def main():
        config = {**OFFLOAD, "max_running_tokens": 200}
        async with serving(config=config, delay_s=0.0005) as (service, engine, channel):
            sleep, wake = control_of(channel)
            rng = np.random.default_rng(0)
            scored = asyncio.Event()

            async def control():
                while not scored.is_set():
                    await (sleep() if rng.random() < 0.6 else wake())
                    await asyncio.sleep(0.005 * rng.random())

            async def scores():
                for _ in range(20):
                    lengths = [20] * int(rng.integers(1, 15))
                    chunks = await score(channel, request(*lengths))  # FakeEngine fails if it is asleep
                    assert sum(len(chunk.logprobs) for chunk in chunks) == 19 * len(lengths)

            controls = [asyncio.create_task(control()) for _ in range(2)]
            await asyncio.gather(*(scores() for _ in range(5)))
            scored.set()
            await asyncio.gather(*controls)
            assert engine.num_sleeps > 5 and 0 <= engine.num_sleeps - engine.num_wakes <= 1
            assert service.queue.queued_tokens == service.queue.running_tokens == 0

    run(main)


@pytest.mark.parametrize("at", ["waiting for running calls", "falling asleep", "waking"])
def test_draining_is_final_whatever_transition_is_in_progress(at):
    states = []

    class Slow(Gated):
        async def sleep(self):
            await super().sleep()
            if at == "falling asleep":
                self.under_way.set()
                await self.go_on.wait()

        async def wake(self):
            self.under_way.set()
            await self.go_on.wait()
            await super().wake()

        under_way, go_on = None, None

    async def main():
        Slow.under_way, Slow.go_on = asyncio.Event(), asyncio.Event()
        async with serving(Slow, config={**OFFLOAD, "max_running_tokens": 10}, states=states) as (
            service,
            engine,
            channel,
        ):
            sleep, wake = control_of(channel)
            scoring = []
            if at == "waiting for running calls":
                scoring = [asyncio.create_task(score(channel, request(10))) for _ in range(2)]
                await until(lambda: len(service.open_calls) == 2)
            if at == "waking":
                await sleep()
            call = asyncio.create_task(wake() if at == "waking" else sleep())
            await (until(lambda: service.lifecycle._falling_asleep) if scoring else engine.under_way.wait())
            await service.lifecycle.refuse(UnavailableError("shutting down"))
            engine.go_on.set()
            engine.gate.set()
            if at == "waking":
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call
            else:
                code, text, _, _ = await control_failure(call)
                assert code == grpc.StatusCode.UNAVAILABLE and "shutting down" in text
            for one in scoring:
                assert await one, "accepted calls are finished"
            assert engine.asleep == (at == "falling asleep")
            for one in (sleep(), wake()):
                code, text, _, _ = await control_failure(one)
                assert code == grpc.StatusCode.UNAVAILABLE and "shutting down" in text
            code, _, _, _ = await failure(channel, request(5))
            assert code == grpc.StatusCode.UNAVAILABLE
            assert service.lifecycle.state is ServerState.DRAINING

    run(main)
    assert states[-1] is ServerState.DRAINING and states.count(ServerState.DRAINING) == 1


def test_scores_that_wait_for_a_wake_are_unavailable_when_the_server_drains():
    class NeverWakes(fake.FakeEngine):
        async def wake(self):
            await asyncio.Event().wait()

    async def main():
        async with serving(NeverWakes, config=OFFLOAD) as (service, _, channel):
            await control_of(channel)[0]()
            scoring = asyncio.create_task(score(channel, request(5)))
            await until(lambda: service.queue.queued_tokens)
            await service.lifecycle.refuse(UnavailableError("shutting down"))
            with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
                await scoring

    run(main)


@pytest.mark.parametrize("by", ["wake", "score"])
def test_an_engine_that_wakes_with_other_weights_is_dead(by):
    async def main():
        async with serving(config=OFFLOAD, wakes_as="other") as (service, _, channel):
            sleep, wake = control_of(channel)
            await sleep()
            if by == "wake":
                code, text, info, _ = await control_failure(wake())
                assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH")
                assert "'tiny'" in text
            else:
                code, text, info, _ = await failure(channel, request(5))
                assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD") and "other weights" in text
            assert service.lifecycle.dead.is_set() and service.lifecycle.state is ServerState.DRAINING
            code, _, info, _ = await failure(channel, request(5))
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")

    run(main)


@pytest.mark.parametrize("step", ["sleep", "wake"])
@pytest.mark.parametrize("error", [EngineDeadError("the GPU fell off"), RuntimeError("secret path")])
def test_an_engine_that_fails_to_sleep_or_to_wake_is_dead(step, error):
    class Failing(fake.FakeEngine):
        pass

    async def fail(self):
        raise error

    setattr(Failing, step, fail)

    async def main():
        async with serving(Failing, config=OFFLOAD) as (service, _, channel):
            sleep, wake = control_of(channel)
            if step == "wake":
                await sleep()
            code, text, info, _ = await control_failure(sleep() if step == "sleep" else wake())
            assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert "secret" not in text and ("GPU" in text or f"could not {step if step == 'wake' else 'fall'}" in text)
            assert service.lifecycle.dead.is_set()

    run(main)


@pytest.mark.parametrize("while_", ["idle", "a call hangs", "it sleeps", "it drains"])
def test_an_engines_death_is_noticed_and_ends_running_and_waiting_calls(monkeypatch, while_):
    monkeypatch.setattr(lifecycle_module, "CHECK_EVERY_S", 0.01)

    async def main():
        config = {**OFFLOAD, "max_running_tokens": 10}
        async with serving(Gated, config=config) as (service, engine, channel):
            calls = []
            if while_ in ("a call hangs", "it drains"):
                calls = [asyncio.create_task(score(channel, request(10))) for _ in range(2)]
                await until(lambda: len(service.open_calls) == 2)
            if while_ == "it sleeps":
                await control_of(channel)[0]()
            if while_ == "it drains":
                await service.lifecycle.refuse(UnavailableError("shutting down"))
            engine._dead = True
            async with asyncio.timeout(60):
                await service.lifecycle.dead.wait()
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                code, _, info, _ = explain(caught.value)
                assert (code, info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DEAD")
            assert service.lifecycle.state is ServerState.DRAINING
            value = service.metrics.registry.get_sample_value
            assert value("jdistill_engine_errors_total", {"reason": "ENGINE_DEAD"}) == 1

    run(main)


def test_an_inconclusive_check_of_the_engine_is_logged_once_and_ends_nothing(monkeypatch, caplog):
    monkeypatch.setattr(lifecycle_module, "CHECK_EVERY_S", 0.005)

    class Flaky(fake.FakeEngine):
        num_checks = 0

        async def check(self):
            self.num_checks += 1
            raise TimeoutError("no answer")

    async def main():
        async with serving(Flaky) as (service, engine, channel):
            await until(lambda: engine.num_checks > 5)
            assert not service.lifecycle.dead.is_set() and await score(channel, request(5))

    run(main)
    assert caplog.text.count("the check of the engine failed") == 1
