"""Cancelling, slow readers, pools that fail."""

import gc
import time

from helixflow.core_rs import Call, Unavailable
from helixflow.engine.scripted import Gate

from .harness import LIMIT_S, Harness, Served, events, idle, poll, run, serving, text_of


def test_cancel_and_drop_free_the_slot() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        cancelled = harness.chat()
        dropped = harness.chat()
        for call in (cancelled, dropped):
            await harness.until(call, lambda call: call.accepted)
        await poll(served.pool.stats, lambda stats: stats.running == 2)
        cancelled.cancel()
        await harness.until(cancelled, lambda call: call.done)
        assert (cancelled.finish_reason, cancelled.error_code, cancelled.take()) == ("cancelled", "cancelled", b"")
        await idle(served, running=1)
        del call, dropped
        gc.collect()
        assert (await idle(served)).requests_cancelled == 2
        assert harness.client.pools()[0].outstanding == 0

    with serving(tokens=0) as served:
        run(test, [served.address])


def test_a_cancelled_call_counts_what_was_generated() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat()
        await harness.until(call, lambda call: bool(call.take()))
        assert call.usage is None
        await generated(harness, served, call)

    with serving(tokens=0) as served:
        run(test, [served.address])


def test_an_unread_call_counts_what_was_generated_and_that_is_bounded() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat()
        await poll(served.pool.stats, lambda stats: stats.parked == 1)
        tokens = await generated(harness, served, call)
        # 16 KiB rendered, 4 KiB on the wire, 64 steps in the pool, and what is on its way between them.
        assert 64 < tokens < 1200

    with serving(tokens=0) as served:
        run(test, [served.address])


async def generated(harness: Harness, served: Served, call: Call) -> int:
    """Cancels a call and compares its counts with those of the pool's only other witness; returns the tokens."""
    call.cancel()
    call.cancel()
    await harness.until(call, lambda call: call.done)
    usage = call.usage
    assert usage is not None
    stats = await idle(served)
    assert usage.prompt_tokens == call.prompt_tokens == stats.prefill_tokens
    assert usage.completion_tokens == stats.decode_tokens + 1, "the first one comes with the prompt"
    assert usage.total_us >= usage.first_token_us > 0
    assert stats.requests_cancelled == 1
    return usage.completion_tokens


def test_a_cancelled_call_of_a_pool_that_stands_still_ends_nevertheless() -> None:
    gate = Gate()

    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat()
        gate.allow(3)
        await harness.until(call, lambda call: bool(call.take()))
        began = time.monotonic()
        call.cancel()
        assert not call.done
        await harness.until(call, lambda call: call.done)
        assert time.monotonic() - began < LIMIT_S / 2
        assert call.usage is not None
        assert call.usage.completion_tokens > 0, "what had arrived"

    with serving(tokens=0, gate=gate) as served:
        run(test, [served.address])


def test_a_call_that_waits_is_not_accepted_and_costs_nothing() -> None:
    gate = Gate()

    async def test(harness: Harness) -> None:
        await harness.ready()
        first = harness.chat()
        await harness.until(first, lambda call: call.accepted)
        late = harness.chat(timeout_ms=50)
        left = harness.chat()
        await poll(served.pool.stats, lambda stats: stats.queued == 2 or stats.requests_failed == 1)
        left.cancel()
        assert (left.done, left.accepted, left.usage) == (True, False, None)
        error = await harness.failure(late)
        assert (error.code, late.accepted, late.usage) == ("deadline_exceeded", False, None)
        assert error.retry_after_s is not None
        await poll(served.pool.stats, lambda stats: stats.queued == 0)

    with serving(tokens=0, slots=1, gate=gate) as served:
        run(test, [served.address])


def test_an_unread_call_is_bounded_and_complete() -> None:
    limit = 2000

    async def test(harness: Harness) -> None:
        await harness.ready()
        unread = harness.chat(max_tokens=limit)
        await harness.until(unread, lambda call: call.accepted)
        other = text_of(events(await harness.finish(harness.chat(max_tokens=limit))))
        assert not unread.done
        first = unread.take()
        assert 4096 <= len(first) < 8192
        assert text_of(events(first + await harness.finish(unread))) == other
        assert unread.finish_reason == "length"
        assert unread.usage is not None
        assert unread.usage.completion_tokens == limit

    with serving(tokens=0) as served:
        run(test, [served.address], stream_buffer_bytes=4096)


def test_a_failure_behind_the_first_text_is_an_event() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat()
        chunks = events(await harness.finish(call))
        assert text_of(chunks)
        assert chunks[-1]["error"]["code"] == "engine_failed"
        assert (call.finish_reason, call.error_code) == ("error", "engine_failed")
        assert call.usage is not None
        assert call.usage.prompt_tokens == call.prompt_tokens
        assert call.usage.completion_tokens > 0

    with serving(tokens=0, fail_at_step=5) as served:
        run(test, [served.address])
    assert served.failure is not None


def test_a_failure_of_a_body_is_raised() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat(stream=False)
        error = await harness.failure(call)
        assert (error.code, error.retryable, call.error_code) == ("engine_failed", True, "engine_failed")
        assert call.usage is not None
        assert call.usage.prompt_tokens == call.prompt_tokens

    with serving(tokens=0, fail_at_step=5) as served:
        run(test, [served.address])


def test_nothing_reachable_fails_at_once() -> None:
    async def test(harness: Harness) -> None:
        call = harness.chat()
        error = await harness.failure(call)
        assert isinstance(error, Unavailable)
        assert (call.prompt_tokens, call.usage) == (None, None)
        assert str(error).startswith("no inference pool is reachable")
        assert error.retry_after_s == 1
        (pool,) = await harness.pools(lambda pools: pools[0].state == "ejected")
        assert pool.last_error is not None

    run(test, ["127.0.0.1:1"])


def test_a_stopped_pool_is_replaced_by_another_and_taken_back() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        held = [harness.chat() for _ in range(2)]
        for call in held:
            await harness.until(call, lambda call: call.accepted)
        assert {call.pool for call in held} == {first.address, second.address}

        # Nothing was shown yet: the call of the stopped pool starts again at the other one.
        first.stop()
        gate.open()
        for call in held:
            assert text_of(events(await harness.finish(call)))
        assert (await harness.pools(lambda pools: pools[0].state == "ejected"))[1].state == "ready"
        assert text_of(events(await harness.finish(harness.chat())))
        with serving(listen=first.address):
            await harness.ready()

    gate = Gate()
    with serving(gate=gate) as second, serving(gate=Gate()) as first:
        run(test, [first.address, second.address])


def test_a_full_queue_is_refused_with_a_time_to_wait() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        calls = [harness.chat() for _ in range(8)]
        done = await poll(lambda: [call for call in calls if call.done], lambda done: len(done) == 5)
        refused = [await harness.failure(call) for call in done]
        assert {error.code for error in refused} == {"queue_full"}
        assert all(error.retry_after_s for error in refused)

    with serving(tokens=0, slots=1, queue_requests=2, gate=Gate()) as served:
        run(test, [served.address])


def test_draining_pools_refuse_new_calls() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        running = harness.chat()
        await harness.until(running, lambda call: call.accepted)
        served.pool.drain()
        await harness.pools(lambda pools: pools[0].state == "draining")
        assert (await harness.failure(harness.chat())).code == "draining"
        gate.open()
        assert text_of(events(await harness.finish(running)))

    gate = Gate()
    with serving(gate=gate) as served:
        run(test, [served.address])


def test_close_ends_calls() -> None:
    async def test(harness: Harness) -> None:
        await harness.ready()
        call = harness.chat()
        await harness.until(call, lambda call: call.accepted)
        harness.client.close()
        error = await harness.failure(call)
        assert (error.code, call.error_code) == ("unavailable", "unavailable")
        assert call.usage is not None
        assert (call.usage.prompt_tokens, call.usage.first_token_us) == (call.prompt_tokens, 0)

    with serving(gate=Gate()) as served:
        run(test, [served.address])
