"""The queue in front of the engine, on an event loop whose clock advances only when all tasks wait."""

import asyncio
import selectors

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.sidecar.fair_queue import MAX_KNOCKING, FairQueue
from jdistill.wire.errors import DeadlineError, OverloadedError, UnavailableError


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Advances its clock instead of waiting; waiting without a timer is an error rather than a hang."""

    def __init__(self):
        super().__init__(_Selector(self))
        self.now = 0.0

    def time(self):
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop):
        super().__init__()
        self._virtual = loop

    def select(self, timeout=None):
        events = super().select(0)
        if not events:
            assert timeout is not None, "deadlock: every task waits, and there is no timer"
            self._virtual.now += timeout
        return events


def run(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def make_queue(max_running=100, max_queued=1000):
    return FairQueue(max_running_tokens=max_running, max_queued_tokens=max_queued)


def started(entry):
    """Returns the numbers of the pieces that have started and not ended."""
    return list(entry.running)


def finish(entry, piece=0):
    """Scores a running piece completely and ends it."""
    entry.scored(piece, entry.running[piece])
    entry.done(piece)


async def outcome(entry, piece=0):
    try:
        await entry.turn(piece)
    except (DeadlineError, UnavailableError) as e:
        return e
    return "started"


sizes_of_sequences = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(sizes_of_sequences, st.integers(1, 80))
def test_pieces_are_consecutive_and_complete_and_only_one_if_the_call_fits(sizes, max_running):
    pieces = make_queue(max_running).cut(sizes)
    assert [i for piece in pieces for i in piece] == list(range(len(sizes)))
    if sum(sizes) <= max_running:
        assert len(pieces) == 1
    for piece in pieces:
        assert len(piece) >= 1
        assert len(piece) == 1 or sum(sizes[i] for i in piece) <= max_running
    assert make_queue(max_running).cut(sizes) == pieces, "the same call is always cut the same way"


def test_a_call_that_fits_is_started_before_enter_returns():
    async def main():
        queue = make_queue()
        first, second = queue.enter("a", [60]), queue.enter("b", [40])
        assert started(first) == started(second) == [0]
        assert (queue.running_tokens, queue.queued_tokens) == (100, 0)
        third = queue.enter("c", [1])
        assert started(third) == [] and queue.queued_tokens == 1
        first.scored(0, 10)  # one of its sequences
        assert started(third) == [0], "a scored sequence makes room before its call ends"
        assert queue.running_tokens == 91

    run(main())


def test_a_call_larger_than_every_limit_is_served_if_nothing_waits():
    async def main():
        queue = make_queue(max_running=100, max_queued=50)
        huge = queue.enter("a", [5000])
        assert started(huge) == [0]
        also_huge = queue.enter("a", [7000])
        assert started(also_huge) == [] and queue.queued_tokens == 7000
        with pytest.raises(OverloadedError):
            queue.enter("b", [1])
        finish(huge)
        assert started(also_huge) == [0]

    run(main())


def test_a_large_call_is_not_overtaken_forever_by_small_ones():
    async def main():
        queue = make_queue(max_running=100)
        running = [queue.enter("small", [30]) for _ in range(3)]
        large = queue.enter("large", [100])
        for _ in range(20):
            running.append(queue.enter("small", [30]))
        for _ in range(3):
            assert started(large) == []
            finish(running.pop(0))
        assert started(large) == [0]

    run(main())


@given(
    st.lists(st.lists(st.integers(1, 100), min_size=30, max_size=30), min_size=2, max_size=5),
    st.integers(100, 300),
)
@settings(deadline=None)
def test_clients_that_always_wait_get_equal_tokens_whatever_the_size_of_their_calls(calls_of_clients, max_running):
    async def main():
        queue = make_queue(max_running, max_queued=10**9)
        # The engine is busy with another client, so that the order of arrival gives no advantage.
        plug = queue.enter("plug", [max_running])
        entries = [
            (client, size, queue.enter(str(client), [size]))
            for client, sizes in enumerate(calls_of_clients)
            for size in sizes
        ]
        finish(plug)
        served = [0] * len(calls_of_clients)
        waiting, in_engine = list(entries), []
        while True:
            for item in list(waiting):
                if started(item[2]):
                    waiting.remove(item)
                    in_engine.append(item)
                    served[item[0]] += item[1]
            if len({client for client, _, _ in waiting}) < len(served):
                return  # one client has no waiting calls left
            # Start-time fair queueing: no further apart than one call of each.
            assert max(served) - min(served) <= 200
            finish(in_engine.pop(0)[2])

    run(main())


def test_a_client_that_was_away_gets_no_credit_for_it():
    async def main():
        queue = make_queue(max_running=10, max_queued=10**6)
        busy = [queue.enter("busy", [10]) for _ in range(100)]
        for entry in busy[:50]:
            finish(entry)
        late = [queue.enter("late", [10]) for _ in range(50)]
        order = []
        for _ in range(20):
            (running,) = [e for e in busy + late if started(e)]
            order.append(running.client)
            finish(running)
        assert 9 <= order.count("late") <= 11, order

    run(main())


def test_the_retry_delay_follows_the_throughput_and_ignores_idle_time():
    async def main():
        queue = make_queue(max_running=100, max_queued=100)

        async def busy(seconds):
            for _ in range(seconds * 10):
                entry = queue.enter("a", [100])
                await asyncio.sleep(0.1)
                finish(entry)

        queue.enter("a", [100]).leave()
        await busy(30)  # 1000 tokens a second
        await asyncio.sleep(3600)
        await busy(1)
        queue.enter("a", [100])
        queue.enter("a", [70])
        with pytest.raises(OverloadedError, match=r"70 tokens wait .* this call has 80 .* limit is 100") as caught:
            queue.enter("a", [80])
        assert caught.value.retry_after_s == pytest.approx(0.05, abs=1e-3)  # 50 tokens too many
        with pytest.raises(OverloadedError) as caught:
            queue.enter("a", [800])  # more than the limit: accepted once the queue is empty
        assert caught.value.retry_after_s == pytest.approx(0.07, abs=1e-3)

    run(main())


def test_the_retry_delay_has_a_default_before_any_measurement_and_is_bounded_after():
    async def main():
        queue = make_queue(max_running=10, max_queued=1)
        running, _ = queue.enter("a", [10]), queue.enter("a", [10**9])
        with pytest.raises(OverloadedError) as caught:
            queue.enter("a", [1])
        assert caught.value.retry_after_s == 0.5
        await asyncio.sleep(1)
        finish(running)
        queue.enter("a", [10**9])
        with pytest.raises(OverloadedError) as caught:
            queue.enter("a", [1])
        assert caught.value.retry_after_s == 10.0

    run(main())


def test_a_client_that_floods_the_queue_does_not_keep_others_out():
    async def main():
        queue = make_queue(max_running=100, max_queued=1000)
        live, polite, refused = [], [], 0

        def flood():
            while True:
                try:
                    live.append(queue.enter("hog", [100]))
                except OverloadedError:
                    return

        flood()
        for _ in range(60):
            await asyncio.sleep(0.1)
            finish(next(e for e in live + polite if started(e)))
            flood()  # always the first to retry
            try:
                polite.append(queue.enter("polite", [100]))
            except OverloadedError:
                refused += 1
        assert len(polite) >= 25, f"accepted {len(polite)} times, refused {refused} times"

    run(main())


def test_a_refused_client_that_stays_away_soon_stops_restricting_others():
    async def main():
        queue = make_queue(max_running=10, max_queued=100)
        queue.enter("a", [10])
        waiting = [queue.enter("a", [10]) for _ in range(10)]
        with pytest.raises(OverloadedError):
            queue.enter("b", [10])
        waiting.pop().leave()
        with pytest.raises(OverloadedError):
            queue.enter("a", [10])  # there is room, but it is for b
        await asyncio.sleep(60)
        queue.enter("a", [10])

    run(main())


def test_client_names_do_not_accumulate():
    async def main():
        queue = make_queue(max_running=10, max_queued=10)
        queue.enter("first", [10])
        queue.enter("second", [10])
        for i in range(5 * MAX_KNOCKING):
            with pytest.raises(OverloadedError):
                queue.enter(f"refused {i}", [1])
        assert len(queue._knocking) <= MAX_KNOCKING
        queue = make_queue(max_running=10, max_queued=10**6)
        entries = [queue.enter(f"served {i}", [10]) for i in range(500)]
        for entry in entries:
            finish(entry)
        assert len(queue._tags) < 50 and not queue._clients and not queue._queued_of

    run(main())


def test_a_passed_deadline_removes_exactly_that_call_from_the_queue():
    async def main():
        loop = asyncio.get_running_loop()
        queue = make_queue(max_running=10)
        running = queue.enter("a", [10], deadline=5.0)
        late, patient = queue.enter("a", [10], deadline=3.0), queue.enter("a", [10], deadline=100.0)
        error = await outcome(late)
        assert isinstance(error, DeadlineError) and loop.time() == 3.0
        assert queue.queued_tokens == 10
        await asyncio.sleep(10)
        assert started(running) == [0], "the queue does not end running pieces"
        finish(running)
        assert started(late) == [] and started(patient) == [0]
        late.leave()
        await asyncio.sleep(200)
        assert started(patient) == [0]

    run(main())


def test_waiting_pieces_of_a_started_call_leave_at_the_deadline():
    async def main():
        queue = make_queue(max_running=10)
        entry = queue.enter("a", [10, 10, 10], deadline=3.0)
        assert isinstance(await outcome(entry, 2), DeadlineError)
        assert started(entry) == [0] and queue.queued_tokens == 0
        entry.leave()
        assert queue.running_tokens == 0

    run(main())


def test_thousands_of_deadlines_at_once_do_not_recurse_and_a_late_timer_starts_nothing():
    async def main():
        loop = asyncio.get_running_loop()
        queue = make_queue(max_running=10, max_queued=10**6)
        running = queue.enter("a", [10])
        entries = [queue.enter(f"c{i % 7}", [10], deadline=3.0) for i in range(3000)]
        loop.now = 4.0  # the loop was busy: no timer has fired
        finish(running)
        assert not any(started(entry) for entry in entries)
        assert queue.queued_tokens == queue.running_tokens == 0
        assert isinstance(await outcome(entries[-1]), DeadlineError)

    run(main())


def test_a_call_that_leaves_makes_room_in_queue_and_engine():
    async def main():
        queue = make_queue(max_running=10)
        running, waiting, after = (queue.enter("a", [10, 10]) for _ in range(3))
        waiting.leave()
        assert queue.queued_tokens == 30
        running.leave()
        running.leave()
        assert started(after) == [0]
        assert (queue.running_tokens, queue.queued_tokens) == (10, 10)

    run(main())


def test_calls_behind_a_large_one_start_when_it_leaves_and_fail_when_all_fail():
    async def main():
        for leaves in (True, False):
            queue = make_queue(max_running=100)
            queue.enter("a", [60])
            large, small = queue.enter("b", [100]), queue.enter("c", [30])
            assert started(small) == []
            if leaves:
                large.leave()
                assert started(small) == [0]
            else:
                queue.fail_waiting(UnavailableError("asleep"))
                assert str(await outcome(large)) == str(await outcome(small)) == "asleep"
                assert started(small) == [] and queue.queued_tokens == 0

    run(main())


def test_pause_lets_started_calls_finish_and_starts_no_others():
    async def main():
        queue = make_queue(max_running=10)
        begun, waiting = queue.enter("a", [10, 10]), queue.enter("b", [10])
        queue.pause()
        empty = asyncio.ensure_future(queue.wait_until_nothing_runs())
        finish(begun, 0)
        await asyncio.sleep(1)
        assert started(begun) == [1] and not empty.done()
        finish(begun, 1)
        await empty
        assert started(waiting) == [] and started(queue.enter("c", [1])) == []
        assert queue.queued_tokens == 11
        queue.resume()
        assert started(waiting) == [0]

    run(main())


def test_a_scored_piece_counts_as_running_until_the_engines_iterator_is_closed():
    async def main():
        queue = make_queue(max_running=10)
        entry = queue.enter("a", [10])
        queue.pause()
        entry.scored(0, 10)
        empty = asyncio.ensure_future(queue.wait_until_nothing_runs())
        await asyncio.sleep(1)
        assert queue.running_tokens == 0 and not empty.done()
        entry.done(0)
        await empty

    run(main())


def test_fail_waiting_spares_started_calls_and_starts_nothing():
    async def main():
        queue = make_queue(max_running=10)
        begun = queue.enter("a", [10, 10])
        waiting = [queue.enter(client, [10]) for client in "abcabc"]
        queue.fail_waiting(UnavailableError("asleep"))
        errors = [await outcome(entry) for entry in waiting]
        assert all(isinstance(e, UnavailableError) and str(e) == "asleep" for e in errors)
        assert len({id(e) for e in errors}) == len(errors), "a shared error would keep the frames of every raiser"
        assert queue.queued_tokens == 10 and started(begun) == [0]
        finish(begun)
        assert started(begun) == [1] and not any(started(entry) for entry in waiting)

    run(main())


def test_a_held_call_delays_only_its_own_client():
    async def main():
        queue = make_queue(max_running=10)
        slow = queue.enter("slow reader", [10, 10])
        behind, other = queue.enter("slow reader", [10]), queue.enter("other", [10])
        slow.hold(True)
        finish(slow)
        assert started(other) == [0]
        finish(other)
        assert started(slow) == started(behind) == [] and queue.running_tokens == 0
        slow.hold(False)
        assert started(slow) == [1]
        finish(slow, 1)
        assert started(behind) == [0]

    run(main())


OPERATIONS = st.one_of(
    st.tuples(st.just("enter"), st.integers(0, 3), st.lists(st.integers(1, 60), min_size=1, max_size=3)),
    st.tuples(st.just("enter until"), st.integers(0, 3), st.lists(st.integers(1, 60), min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["score", "end", "leave", "hold", "let go"]), st.integers(0, 50), st.just(())),
    st.tuples(st.sampled_from(["pause", "resume", "fail", "wait"]), st.just(0), st.just(())),
)


@given(st.lists(OPERATIONS, max_size=60))
@settings(max_examples=300, deadline=None)
def test_limits_order_and_counts_hold_under_any_operations_and_everything_ends(operations):
    max_running, max_queued = 50, 120

    async def main():
        queue = make_queue(max_running, max_queued)
        loop = asyncio.get_running_loop()
        entries, fates, begun, paused, largest_wait = [], {}, [], False, 0

        def look():
            nonlocal largest_wait
            for entry in entries:
                for piece in entry.running:
                    if (entry, piece) not in begun:
                        begun.append((entry, piece))
            waiting = sum(sum(entry.waiting) for entry in entries)
            running = sum(sum(entry.running.values()) for entry in entries)
            assert (queue.queued_tokens, queue.running_tokens) == (waiting, running)
            in_engine = [size for entry in entries for size in entry.running.values() if size]
            assert running <= max_running or len(in_engine) == 1
            assert waiting <= max(max_queued, largest_wait)
            if waiting and not paused and not any(entry.held for entry in entries):
                assert running, "the engine is idle while calls wait"
            if not waiting:
                largest_wait = 0
            # Within a client the oldest call first, and within a call its pieces in order.
            for client in range(4):
                order = [(entries.index(e), piece) for e, piece in begun if e.client == str(client)]
                assert order == sorted(order)

        for name, number, sizes in operations:
            alive = [entry for entry in entries if fates[entry] == "alive"]
            entry = alive[number % len(alive)] if alive else None
            if name.startswith("enter"):
                nothing_waits = not queue.queued_tokens
                deadline = loop.time() + 5 if name == "enter until" else None
                try:
                    new = queue.enter(str(number), sizes, deadline=deadline)
                except OverloadedError as e:
                    assert not nothing_waits and 0 < e.retry_after_s <= 10
                else:
                    entries.append(new)
                    fates[new] = "alive"
                    if nothing_waits:
                        largest_wait = sum(sizes)
            elif name == "pause":
                queue.pause()
                paused = True
            elif name == "resume":
                queue.resume()
                paused = False
            elif name == "fail":
                queue.fail_waiting(UnavailableError("x"))
            elif name == "wait":
                await asyncio.sleep(2)
            elif entry is not None and name == "leave":
                entry.leave()
                fates[entry] = "gone"
                assert not entry.waiting and not entry.running
            elif entry is not None and name in ("hold", "let go"):
                entry.hold(name == "hold")
            elif entry is not None and entry.running:
                piece = next(iter(entry.running))
                if name == "score" and entry.running[piece]:
                    entry.scored(piece, 1 + (entry.running[piece] - 1) // 2)
                elif name == "end":
                    entry.done(piece)
            look()
        # Finally release and finish all remaining calls.
        for entry in entries:
            entry.hold(False)
        queue.resume()
        paused = False
        look()
        for _ in range(1000):
            running = next((entry for entry in entries if entry.running), None)
            if running is None:
                break
            running.done(next(iter(running.running)))
            look()
        assert queue.queued_tokens == queue.running_tokens == 0
        await queue.wait_until_nothing_runs()
        assert len(begun) == len(set(begun)), "a piece was started twice"
        for entry in entries:
            pieces = sorted(piece for e, piece in begun if e is entry)
            assert pieces == list(range(len(pieces)))
            given_up = [turn for turn in entry._turns[len(pieces) :]]
            assert all(turn.cancelled() or turn.exception() for turn in given_up), (
                "a piece is lost: its wait never ends"
            )

    run(main())
