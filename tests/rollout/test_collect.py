"""Collecting a step's rollout with a scripted task, sampler and teacher, which write what happens into one log."""

import contextlib

import numpy as np
import pytest

from jdistill.config import TrainConfig, parse
from jdistill.rollout.collect import Collector
from jdistill.rollout.completion import Completion
from jdistill.rollout.sampled import SampledBatch
from jdistill.tasks.base import Problem

G = 3  # completions per prompt


def train_config(num_prompts=2, **sections):
    data = {
        "run_dir": "unused",
        "seed": 11,
        "num_steps": 10,
        "model": {"path": "unused"},
        "task": {"name": "unused"},
        "teacher": {"endpoints": ["unused:1"]},
        "rollout": {"num_prompts": num_prompts, "num_completions": G, "max_new_tokens": 9, "temperature": 0.7},
        "objective": {"distill_loss_weight": 1.0},
    }
    for name, section in sections.items():
        data[name] |= section
    return parse(TrainConfig, data)


class FakeTask:
    """Problem i has the prompt (100 + i,) and a scripted reward for each of its G completions, by default 0, 1, 2."""

    def __init__(self, log, rewards_of=None):
        self.log = log
        self.rewards_of = rewards_of or {}
        self.asked = []

    def train_problem(self, index):
        self.asked.append(index)
        return Problem(index, "train", np.array([100 + index], np.int32), {})

    def response(self, completion):
        return completion

    def reward(self, problem, response):
        g = int(response.completion_ids[0])
        self.log.append(("reward", problem.index, g))
        reward = self.rewards_of.get(problem.index, (0.0, 1.0, 2.0))[g]
        if isinstance(reward, Exception):
            raise reward
        return reward


class FakeSampler:
    """Completes request i with the tokens (i % G, ...), g + 1 in all; the last request ends first."""

    def __init__(self, log, num_lost=0):
        self.log = log
        self.num_lost = num_lost
        self.calls = []
        self.is_on_its_devices = False

    @contextlib.contextmanager
    def on_its_devices(self):
        self.is_on_its_devices = True
        yield
        self.is_on_its_devices = False

    def sample(self, weights, prompts, *, seeds, temperature):
        assert self.is_on_its_devices
        self.calls.append((weights, [int(ids[0]) for ids in prompts], seeds, temperature))
        for index in reversed(range(self.num_lost, len(prompts))):
            self.log.append(("sampled", index))
            g = index % G
            yield Completion(
                index=index,
                token_ids=np.concatenate([prompts[index], np.full(g + 1, g, np.int32)]),
                prompt_length=1,
                sampler_logprobs=np.zeros(g + 1, np.float32),
                candidate_ids=None,
                finish_reason="stop",
            )


class FakeTeacher:
    """Notes which completion it gets under which number."""

    def __init__(self, log, offload=False):
        self.log = log
        self.offload = offload
        self.batches = []

    def new_batch(self):
        self.batches.append(FakeScoring(self.log))
        return self.batches[-1]

    def wake(self):
        self.log.append(("wake",))


class FakeScoring:
    def __init__(self, log):
        self.log = log
        self.sent = {}

    def submit(self, index, problem, completion):
        assert index not in self.sent, f"completion {index} was sent twice"
        self.log.append(("sent", index))
        self.sent[index] = (problem, completion)

    def submit_rest(self, problems, completions):
        for index, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
            if index not in self.sent:
                self.submit(index, problem, completion)


class World:
    """A collector and the scripted parts around it."""

    def __init__(
        self, config=None, *, rewards_of=None, offload=False, teacher=True, own=None, maximum=lambda n: n, num_lost=0
    ):
        config = config or train_config()
        self.log, self.phases = [], []
        self.task, self.sampler = FakeTask(self.log, rewards_of), FakeSampler(self.log, num_lost)
        self.teacher = FakeTeacher(self.log, offload) if teacher else None
        own = own or slice(0, config.rollout.num_prompts)
        self.collector = Collector(
            config,
            self.task,
            self.sampler,
            self.teacher,
            own_prompts=own,
            maximum=maximum,
            show_phase=self.phases.append,
        )

    def collect(self, step=4, first_problem=20):
        return self.collector.collect("weights", step, first_problem)

    def happened(self, kind):
        return [entry[1:] for entry in self.log if entry[0] == kind]


def assert_sent_as_trained_on(scoring, batch):
    """Each row of the batch was sent under its own number, with its own problem."""
    assert sorted(scoring.sent) == list(range(len(batch.completions)))
    for index, (problem, completion) in scoring.sent.items():
        assert problem is batch.problems[index]
        assert completion is batch.completions[index]


# ---- one round ----


def test_rows_are_group_by_group_although_they_end_in_another_order():
    world = World(rewards_of={20: (0.5, 1.0, 1.5), 21: (2.0, 2.5, 3.0)})
    batch = world.collect().batch
    assert world.task.asked == [20, 21]
    assert [problem.index for problem in batch.problems] == [20] * G + [21] * G
    assert [c.token_ids.tolist() for c in batch.completions[:G]] == [[120, 0], [120, 1, 1], [120, 2, 2, 2]]
    np.testing.assert_array_equal(batch.rewards, np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], np.float32), strict=True)
    assert batch.order.tolist() == [5, 4, 3, 2, 1, 0]
    assert (batch.num_dropped, batch.next_problem) == (0, 22)
    assert world.phases == ["sampling"]
    [(weights, prompts, _, temperature)] = world.sampler.calls
    assert (weights, prompts, temperature) == ("weights", [120] * G + [121] * G, 0.7)
    assert not world.sampler.is_on_its_devices


def test_the_teacher_gets_each_completion_once_as_soon_as_it_ends():
    world = World()
    rollout = world.collect()
    assert [entry[0] for entry in world.log] == ["sampled", "reward", "sent"] * 6
    assert world.happened("sent") == world.happened("sampled") == [(5,), (4,), (3,), (2,), (1,), (0,)]
    world.collector.send(rollout)  # as before every update
    assert len(world.happened("sent")) == 6
    assert rollout.scoring is world.teacher.batches[0]
    assert_sent_as_trained_on(rollout.scoring, rollout.batch)


def test_a_teacher_that_sleeps_gets_all_completions_after_it_was_woken():
    world = World(offload=True)
    rollout = world.collect()
    assert (world.happened("sent"), world.happened("wake")) == ([], [])
    world.collector.send(rollout)
    assert world.log[12:] == [("wake",), *(("sent", index) for index in range(6))]
    assert world.phases == ["sampling", "waking the teacher"]
    assert_sent_as_trained_on(rollout.scoring, rollout.batch)


def test_without_a_teacher_there_is_nothing_to_send():
    world = World(teacher=False)
    rollout = world.collect()
    world.collector.send(rollout)
    assert rollout.scoring is None
    assert len(rollout.batch.completions) == 6
    assert world.happened("sent") == []


@pytest.mark.parametrize("offload", [False, True])
def test_a_restored_batch_is_sent_again_and_not_sampled_again(offload):
    batch = World().collect().batch
    world = World(offload=offload)
    rollout = world.collector.resume(batch)
    assert rollout.batch is batch
    assert world.log == [("wake",)] * offload + [("sent", index) for index in range(6)]
    assert_sent_as_trained_on(rollout.scoring, batch)
    assert World(teacher=False).collector.resume(batch) == (batch, None)


def test_two_batches_may_be_scored_at_the_same_time():
    world = World()
    first, second = world.collect(step=4), world.collect(step=5, first_problem=22)
    assert first.scoring is not second.scoring
    for rollout in (first, second):
        assert_sent_as_trained_on(rollout.scoring, rollout.batch)


# ---- errors ----


@pytest.mark.parametrize("dynamic_sampling", [0, 2])
def test_an_error_in_a_reward_ends_the_step_with_that_error(dynamic_sampling):
    error = ZeroDivisionError("in the user's reward")
    config = train_config(objective={"dynamic_sampling": dynamic_sampling})
    world = World(config, rewards_of={20: (0.0, 1.0, error)})
    with pytest.raises(ZeroDivisionError, match="in the user's reward") as raised:
        world.collect()
    assert raised.value is error
    # Rows 5, 4, 3 were rewarded; row 2 failed and is never scored.
    assert world.happened("sampled") == [(5,), (4,), (3,), (2,)]
    assert world.happened("sent") == ([] if dynamic_sampling else [(5,), (4,), (3,)])


def test_a_completion_that_the_sampler_lost_is_an_error_and_not_a_reward_of_0():
    with pytest.raises(AssertionError):
        World(num_lost=1).collect()


# ---- seeds ----


def seeds_of(step, config=None, **keys):
    world = World(config, **keys)
    world.collect(step)
    return [seeds for _, _, seeds, _ in world.sampler.calls]


def test_seeds_are_a_function_of_the_runs_seed_and_the_step_alone():
    [seeds_B] = seeds_of(step=4)
    # Pinned: a run that is resumed with a newer jdistill or numpy samples the same completions.
    pinned = np.array([961975133, 755376665, 2618841512, 242696102, 1078380653, 2318725035], np.uint32)
    np.testing.assert_array_equal(seeds_B, pinned, strict=True)
    world = World()
    for step in (3, 4):  # whatever was sampled before
        world.collect(step, first_problem=50 * step)
    np.testing.assert_array_equal(world.sampler.calls[1][2], seeds_B)
    another_seed = World(train_config().model_copy(update={"seed": 12}))
    another_seed.collect(4)
    everything = [seeds_B, world.sampler.calls[0][2], another_seed.sampler.calls[0][2]]
    assert len(np.unique(everything)) == 18


def test_processes_share_out_the_prompts_and_seeds_of_one_process():
    config = train_config(num_prompts=4)
    whole = World(config)
    whole.collect()
    parts = [World(config, own=own) for own in (slice(0, 1), slice(1, 4))]
    for part in parts:
        assert part.collect().batch.next_problem == 24  # past the prompts of all processes
    assert [part.task.asked for part in parts] == [[20], [21, 22, 23]]
    np.testing.assert_array_equal(
        np.concatenate([part.sampler.calls[0][2] for part in parts]), whole.sampler.calls[0][2]
    )


def test_rounds_have_different_seeds_and_the_first_those_of_a_step_without_rounds():
    config = train_config(objective={"dynamic_sampling": 3})
    rounds = seeds_of(4, config, rewards_of=dict.fromkeys(range(20, 40), (1.0, 1.0, 1.0)))
    assert len(rounds) == 3
    assert len(np.unique(rounds)) == 18
    np.testing.assert_array_equal(rounds[0], seeds_of(4)[0])


# ---- dynamic sampling ----

SAME = (1.0, 1.0, 1.0)


def dynamic_config(rounds, num_prompts=4, **sections):
    return train_config(num_prompts, objective={"dynamic_sampling": rounds} | sections.pop("objective", {}), **sections)


def test_rounds_are_sampled_until_enough_groups_have_different_rewards():
    rewards_of = {21: SAME, 23: SAME, 24: SAME}  # 22 of the first round and 25 to 27 of the second have a signal
    world = World(dynamic_config(rounds=5), rewards_of=rewards_of)
    rollout = world.collect()
    batch = rollout.batch
    assert [problem.index for problem in batch.problems[::G]] == [20, 22, 25, 26]
    assert [completion.token_ids[0] for completion in batch.completions[::G]] == [120, 122, 125, 126]
    np.testing.assert_array_equal(batch.rewards, np.tile(np.array([0, 1, 2], np.float32), 4), strict=True)
    assert batch.num_dropped == 4 * G
    assert batch.next_problem == 28
    assert world.phases == ["sampling", "sampling, round 2"]
    # By length, and rows of the same length in the batch's order: what a resumed run adds up in the same order.
    assert batch.order.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    # Dropped completions are never scored: the teacher gets the kept ones at the end, under the batch's numbers.
    assert {entry[0] for entry in world.log[:-12]} == {"sampled", "reward"}
    assert world.log[-12:] == [("sent", index) for index in range(12)]
    assert_sent_as_trained_on(rollout.scoring, batch)


def test_a_first_round_with_enough_signal_is_the_only_one():
    batch = World(dynamic_config(rounds=5)).collect().batch
    assert [problem.index for problem in batch.problems[::G]] == [20, 21, 22, 23]
    assert (batch.num_dropped, batch.next_problem) == (0, 24)


def test_groups_with_equal_rewards_fill_up_after_the_last_round():
    rewards_of = {index: SAME for index in range(20, 28) if index != 25}
    batch = World(dynamic_config(rounds=2), rewards_of=rewards_of).collect().batch
    assert [problem.index for problem in batch.problems[::G]] == [25, 20, 21, 22]
    assert (batch.num_dropped, batch.next_problem) == (4 * G, 28)


def test_the_next_problem_is_past_the_rounds_of_the_process_that_needed_most():
    asked = []

    def maximum(number):
        asked.append(number)
        return 12

    batch = World(dynamic_config(rounds=3), maximum=maximum, own=slice(0, 2)).collect().batch
    assert asked == [4]  # this process needed one round
    assert batch.next_problem == 32


def test_groups_are_compared_by_the_rewards_that_are_trained_on():
    # Completions of 1, 2 and 3 tokens: with a limit of 3 tokens the last 2 of them cost 0, 0.5 and 1.
    rewards_of = {20: SAME, 21: (1.0, 1.5, 2.0)}
    config = dynamic_config(2, num_prompts=1, rollout={"max_new_tokens": 3}, objective={"overlong_buffer": 2})
    batch = World(config, rewards_of=rewards_of).collect().batch
    assert [problem.index for problem in batch.problems] == [20] * G
    np.testing.assert_array_equal(batch.rewards, np.ones(3, np.float32))  # the task's own
    batch = World(config, rewards_of=rewards_of).collect(first_problem=21).batch
    assert [problem.index for problem in batch.problems] == [22] * G
    assert batch.num_dropped == G


def test_an_offloaded_teacher_gets_what_dynamic_sampling_kept():
    world = World(dynamic_config(2), rewards_of={21: SAME}, offload=True)
    rollout = world.collect()
    assert world.happened("sent") == []
    world.collector.send(rollout)
    assert [problem.index for problem in rollout.batch.problems[::G]] == [20, 22, 23, 24]
    assert_sent_as_trained_on(rollout.scoring, rollout.batch)
    assert isinstance(rollout.batch, SampledBatch)
