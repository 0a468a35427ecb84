"""The sampler against full forward passes and exact probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import models
from jdistill.rollout.draw import Truncation, draw_tokens
from jdistill.rollout.sampler import Sampler
from tests.devices import run_on_devices

VOCAB = 23
CONFIG = models.DecoderConfig(
    family="qwen3",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    qk_norm=True,
    initializer_range=0.3,  # so that the distributions are far from uniform
)


@pytest.fixture(scope="module")
def decoder():
    return models.random_init(CONFIG, seed=0)


@pytest.fixture(scope="module")
def params(decoder):
    return nnx.split(decoder)[1]


@pytest.fixture(scope="module")
def sampler(decoder):
    return Sampler(
        decoder, max_prompt_tokens=20, max_new_tokens=13, stop_token_ids=(3, 7), num_candidates=4, chunk_tokens=5
    )


def make_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def run(sampler, params, prompts, **options):
    """Completions in the order of their prompts."""
    options = {"seeds": np.arange(len(prompts)), "temperature": 1.0} | options
    completions = list(sampler.sample(sampler.prepare(params), prompts, **options))
    assert sorted(c.index for c in completions) == list(range(len(prompts)))
    return sorted(completions, key=lambda c: c.index)


@nnx.jit
def full_logits(decoder, tokens_BS):
    hidden_BSD, _ = decoder(tokens_BS, jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape))
    return decoder.logits(hidden_BSD)


def rescored(decoder, token_ids, temperature):
    """Log-probs [S - 1, V] by one full forward pass without a cache."""
    # Two lengths, so two compilations at most; what is behind a token does not matter to it.
    padded = np.zeros((1, 40 if len(token_ids) <= 40 else 320), np.int32)
    padded[0, : len(token_ids)] = token_ids
    logits_SV = full_logits(decoder, padded)[0, : len(token_ids) - 1]
    return np.asarray(jax.nn.log_softmax(logits_SV / temperature, axis=-1))


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_sampled_log_probs_and_candidates_are_those_of_a_full_forward_pass(decoder, sampler, params, temperature):
    prompts = make_prompts(1, 4, 20, 9, 16, 17, 2)
    for c, prompt in zip(run(sampler, params, prompts, temperature=temperature), prompts, strict=True):
        assert c.prompt_length == len(prompt)
        np.testing.assert_array_equal(c.token_ids[: len(prompt)], prompt)
        full_TV = rescored(decoder, c.token_ids, temperature)[len(prompt) - 1 :]
        expected = full_TV[np.arange(len(full_TV)), c.completion_ids]
        np.testing.assert_allclose(c.sampler_logprobs, expected, atol=1e-4, rtol=0)
        assert c.candidate_ids.shape == (len(full_TV), 4)
        np.testing.assert_array_equal(c.candidate_ids, np.argsort(-full_TV, axis=-1, kind="stable")[:, :4])


def test_greedy_takes_the_most_likely_token_and_reports_log_probs_at_the_temperature(decoder, sampler, params):
    for c in run(sampler, params, make_prompts(3, 11, 6), greedy=True, temperature=2.0):
        full_TV = rescored(decoder, c.token_ids, 2.0)[c.prompt_length - 1 :]
        np.testing.assert_array_equal(c.completion_ids, full_TV.argmax(axis=-1))
        np.testing.assert_allclose(c.sampler_logprobs, full_TV.max(axis=-1), atol=1e-4, rtol=0)


def test_a_completion_ends_at_the_first_of_several_stop_tokens_or_at_the_length_limit(sampler, params):
    completions = run(sampler, params, make_prompts(*[5] * 40))
    endings = set()
    for c in completions:
        is_stop = np.isin(c.completion_ids, (3, 7))
        if c.finish_reason == "stop":
            assert is_stop[-1] and not is_stop[:-1].any()
            endings.add(int(c.completion_ids[-1]))
        else:
            assert c.finish_reason == "length" and len(c.completion_ids) == 13 and not is_stop.any()
            endings.add("length")
        assert len(c.sampler_logprobs) == len(c.completion_ids) == len(c.candidate_ids)
    assert endings == {3, 7, "length"}


@pytest.mark.parametrize("max_new_tokens, chunk_tokens", [(1, 4), (9, 4)])
def test_chunks_change_neither_tokens_nor_lengths(decoder, params, max_new_tokens, chunk_tokens):
    def sample(chunk):
        limits = {"max_prompt_tokens": 20, "max_new_tokens": max_new_tokens, "stop_token_ids": (3,)}
        return run(Sampler(decoder, **limits, chunk_tokens=chunk), params, make_prompts(4, 2, 7, 5))

    for c, reference in zip(sample(chunk_tokens), sample(3), strict=True):
        np.testing.assert_array_equal(c.token_ids, reference.token_ids)
        assert c.finish_reason == reference.finish_reason
        assert c.candidate_ids is None
        assert len(c.completion_ids) == max_new_tokens or c.finish_reason == "stop"


def test_log_probs_are_right_while_the_cache_grows(decoder, params):
    sampler = Sampler(decoder, max_prompt_tokens=20, max_new_tokens=290, stop_token_ids=(), chunk_tokens=48)
    for c in run(sampler, params, make_prompts(20, 3)):  # the cache has 128, 256, then 310 slots
        full_TV = rescored(decoder, c.token_ids, 1.0)[c.prompt_length - 1 :]
        assert len(full_TV) == 290
        expected = full_TV[np.arange(290), c.completion_ids]
        np.testing.assert_allclose(c.sampler_logprobs, expected, atol=1e-4, rtol=0)


def test_a_request_does_not_depend_on_batch_mates_row_or_bucket(sampler, params):
    (alone,) = run(sampler, params, make_prompts(6), seeds=[77])
    for row, mates in ((0, [2]), (8, [20, *[5] * 11])):
        prompts, seeds = make_prompts(*mates, seed=9), list(range(len(mates)))
        prompts.insert(row, make_prompts(6)[0])
        seeds.insert(row, 77)
        among = run(sampler, params, prompts, seeds=seeds)[row]
        np.testing.assert_array_equal(among.token_ids, alone.token_ids)
        np.testing.assert_allclose(among.sampler_logprobs, alone.sampler_logprobs, atol=1e-5, rtol=0)


def test_the_same_seeds_give_the_same_completions_and_others_give_others(sampler, params):
    prompts = make_prompts(5) * 16
    first, again, other = (
        run(sampler, params, prompts, seeds=seeds, temperature=4.0)
        for seeds in (np.arange(16), np.arange(16), np.arange(16, 32))
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.sampler_logprobs, b.sampler_logprobs)
    assert len({tuple(c.token_ids) for c in first + other}) > 24  # of 32, some of which end at once


def chi_square(counts, probabilities):
    """(statistic - degrees) / sqrt(2 degrees): about standard normal if the counts follow the probabilities."""
    expected = counts.sum() * probabilities
    kept = expected >= 5
    assert expected[~kept].sum() < 0.02 * counts.sum()
    degrees = kept.sum() - 1
    return (((counts - expected)[kept] ** 2 / expected[kept]).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab_size", [2, 11, 128, 300])
def test_drawn_tokens_follow_the_softmax(vocab_size):
    num = 40_000
    logits = 1.5 * np.random.default_rng(vocab_size).normal(size=vocab_size).astype(np.float32)
    logits[0] = -np.inf
    if vocab_size > 2:
        logits[-1] = -np.inf
    tokens, logprobs = jax.jit(draw_tokens)(
        jnp.broadcast_to(logits, (num, vocab_size)),
        jnp.arange(num, dtype=jnp.uint32) % 200,
        jnp.arange(num, dtype=jnp.int32) // 200,  # 200 seeds at 200 positions
        jnp.bool_(False),
    )
    exact = np.exp(logits - logits.max(), dtype=np.float64)
    exact /= exact.sum()
    counts = np.bincount(tokens, minlength=vocab_size)
    assert counts[exact == 0].sum() == 0
    if vocab_size > 2:
        assert chi_square(counts, exact) < 4
        assert chi_square(counts, np.roll(exact, 1)) > 100  # the test can fail
    np.testing.assert_allclose(logprobs, np.log(exact[np.asarray(tokens)]), atol=1e-5, rtol=1e-5)


def test_two_sampled_tokens_follow_their_joint_probabilities(decoder, params):
    num, prompt = 20_000, np.array([5, 1, 11], np.int32)
    sampler = Sampler(decoder, max_prompt_tokens=3, max_new_tokens=2, stop_token_ids=())
    counts = np.zeros((VOCAB, VOCAB))
    for c in sampler.sample(sampler.prepare(params), [prompt] * num, seeds=np.arange(num), temperature=1.3):
        counts[tuple(c.completion_ids)] += 1
    tokens = np.concatenate([np.tile(prompt, (VOCAB, 1)), np.arange(VOCAB)[:, None]], axis=1)
    p_VSV = np.asarray(jax.nn.softmax(full_logits(decoder, tokens) / 1.3), np.float64)
    joint = p_VSV[0, 2][:, None] * p_VSV[:, 3]
    kept = joint * num >= 5
    binned = np.append(joint[kept], joint[~kept].sum())
    assert chi_square(np.append(counts[kept], counts[~kept].sum()), binned / binned.sum()) < 4


def test_a_second_call_in_the_same_buckets_compiles_nothing(decoder, params):
    sampler = Sampler(decoder, max_prompt_tokens=16, max_new_tokens=6, stop_token_ids=(3,), chunk_tokens=2)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(sampler, params, make_prompts(3, 5, 9, 2))
        assert compiled
        compiled.clear()
        run(sampler, params, make_prompts(16, 1, 2, 4, seed=4), temperature=0.5, seeds=[9, 8, 7, 6], greedy=True)
        assert not compiled
        run(sampler, params, make_prompts(3, 4, 5, 3, 3))  # five rows: another bucket
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_completions_leave_before_the_batch_has_ended(decoder, params):
    sampler = Sampler(decoder, max_prompt_tokens=8, max_new_tokens=60, stop_token_ids=(3, 7), chunk_tokens=2)
    sampled = sampler.sample(sampler.prepare(params), make_prompts(*[5] * 12), seeds=range(12), temperature=1.0)
    lengths = [len(c.completion_ids) for c in sampled]
    assert max(lengths) - min(lengths) > 4
    # In order of their ends, up to the size of a chunk.
    assert all(later >= earlier - 2 for earlier, later in itertools.pairwise(lengths))


LIMITS = {"max_prompt_tokens": 8, "max_new_tokens": 40, "stop_token_ids": (3, 7), "chunk_tokens": 3}


def test_rows_are_refilled_and_moved_together_without_changing_a_completion(decoder, params):
    # Prompts that several requests share, of several lengths, and a limit for each request.
    prompts = [prompt for prompt in make_prompts(5, 2, 8, 3, 5, 4) for _ in range(4)]
    most = np.random.default_rng(0).integers(1, 41, len(prompts))
    options = {"seeds": np.arange(100, 100 + len(prompts)), "max_new_tokens": most, "temperature": 0.7}
    plain = [
        run(
            Sampler(decoder, **LIMITS, num_candidates=2),
            params,
            [prompt],
            **{k: v[i : i + 1] if k != "temperature" else v for k, v in options.items()},
        )[0]
        for i, prompt in enumerate(prompts[:3])
    ]
    at_once = run(Sampler(decoder, **LIMITS, num_candidates=2), params, prompts, **options)
    assert {c.finish_reason for c in at_once} == {"stop", "length"}
    for completion, limit in zip(at_once, most, strict=True):
        assert len(completion.completion_ids) <= limit
        assert completion.finish_reason == "stop" or len(completion.completion_ids) == limit
    for max_rows in (1, 5):
        queued = run(Sampler(decoder, **LIMITS, num_candidates=2, max_rows=max_rows), params, prompts, **options)
        for a, b in zip(at_once, queued, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=1e-5)
            np.testing.assert_array_equal(a.candidate_ids, b.candidate_ids)
            assert a.finish_reason == b.finish_reason
    for a, b in zip(plain, at_once, strict=False):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)


def test_a_refilled_row_starts_before_the_batch_has_ended(decoder, params):
    sampler = Sampler(decoder, **LIMITS | {"stop_token_ids": ()}, max_rows=2)
    most = [40, 4, 4, 4]
    options = {"seeds": range(4), "temperature": 1.0, "max_new_tokens": most}
    order = [c.index for c in sampler.sample(sampler.prepare(params), make_prompts(3, 3, 3, 3), **options)]
    assert order == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"min_p": 0.35}, [0, 1]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # of what top_k leaves 0.5 and 0.3 are 0.8 / 0.9
        ({"top_k": 2, "min_p": 0.1}, [0, 1]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
    ],
)
def test_truncation_keeps_the_tokens_that_it_says(options, kept):
    probabilities = np.array([0.5, 0.3, 0.1, 0.1 * (1 - 1e-3), 1e-4])
    order = np.array([3, 0, 4, 1, 2])  # not sorted
    logits = jnp.log(jnp.asarray(probabilities / probabilities.sum()))[np.argsort(order)][None]
    allowed = Truncation(**options)(logits)
    found = np.flatnonzero(np.isfinite(allowed[0]))
    assert set(found) >= {order[i] for i in kept} and (options == {"top_p": 1.0} or len(found) == len(kept))
    draws = 2000
    repeat = (jnp.repeat(x, draws, axis=0) for x in (logits, allowed))
    full, part = repeat
    tokens, logprobs = draw_tokens(full, jnp.arange(draws, dtype=jnp.uint32), jnp.zeros(draws, jnp.int32), False, part)
    assert set(np.asarray(tokens)) <= set(found)
    np.testing.assert_allclose(logprobs, logits[0, tokens], atol=1e-5)  # of the whole distribution
    shares = np.bincount(np.asarray(tokens), minlength=5) / draws
    expected = np.asarray(jax.nn.softmax(allowed[0]))
    np.testing.assert_allclose(shares, expected, atol=0.05)


def test_no_stop_token_before_min_new_tokens(decoder, params):
    prompts = make_prompts(*[4] * 24)
    plain = run(Sampler(decoder, **LIMITS), params, prompts)
    assert min(len(c.completion_ids) for c in plain) < 6
    longer = run(Sampler(decoder, **LIMITS, min_new_tokens=6), params, prompts)
    for completion in longer:
        assert not np.isin(completion.completion_ids[:6], LIMITS["stop_token_ids"]).any()
    assert min(len(c.completion_ids) for c in longer) == 7  # 6 tokens, and the stop token


@pytest.mark.parametrize("least", [0, 1, 4])
def test_min_new_tokens_is_that_of_transformers(tmp_path, least):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    stops = [*range(0, VOCAB, 2)]  # half of the vocabulary, so that greedy completions end soon
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCAB, **sizes, eos_token_id=stops, initializer_range=0.5)
    )
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path, compute_dtype="float32")
    limits = {"max_prompt_tokens": 8, "max_new_tokens": 9, "stop_token_ids": stops, "chunk_tokens": 3}
    prompts = make_prompts(3, 5, 8, 2, 7, 4)
    sampler = Sampler(ours, **limits, min_new_tokens=least)
    found = run(sampler, nnx.split(ours)[1], prompts, greedy=True)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        options = {"min_new_tokens": least, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert completion.token_ids.tolist() == expected[0].tolist()
    assert len({len(completion.completion_ids) for completion in found}) > 1


def test_min_new_tokens_with_top_k_draws_the_most_likely_token_that_does_not_stop(decoder, params):
    """With top_k = 1 every token was ruled out where a stop token was the most likely one, and token 0 was drawn."""
    stops = tuple(range(VOCAB - 3))  # almost all: mostly the most likely token is one of them
    limits = LIMITS | {"stop_token_ids": stops, "max_new_tokens": 6}
    for c in run(Sampler(decoder, **limits, min_new_tokens=5, top_k=1), params, make_prompts(4, 4, 4)):
        logprobs_TV = rescored(decoder, c.token_ids, 1.0)[c.prompt_length - 1 :]
        best = VOCAB - 3 + logprobs_TV[:5, VOCAB - 3 :].argmax(axis=1)
        np.testing.assert_array_equal(c.completion_ids[:5], best)
        np.testing.assert_allclose(c.sampler_logprobs[:5], logprobs_TV[np.arange(5), best], atol=1e-4)


def test_min_new_tokens_bounds_stop_strings_too(decoder, params):
    limits = LIMITS | {"stop_token_ids": (), "max_new_tokens": 12}
    options = {"decode": lambda ids: "x" * len(ids), "min_new_tokens": 4}
    for completion in run(Sampler(decoder, **limits, stop_strings=["x"], **options), params, make_prompts(4, 2)):
        assert len(completion.completion_ids) == 5
        assert (completion.finish_reason, completion.stop_string_span) == ("stop", (4, 5))


def test_a_stop_token_is_not_searched_for_stop_strings(decoder, params):
    # As in vLLM: the text of a completion that a stop token ends is that of the tokens before it.
    sampler = Sampler(
        decoder,
        **LIMITS | {"stop_token_ids": tuple(range(VOCAB))},
        stop_strings=["x"],
        decode=lambda ids: "x" * len(ids),
    )
    (completion,) = run(sampler, params, make_prompts(4))
    assert (completion.finish_reason, completion.stop_string_span) == ("stop", None)


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(decoder, params):
    def decode(ids):
        return "".join(chr(ord("a") + int(i)) for i in ids)

    limits = LIMITS | {"stop_token_ids": ()}
    prompts = make_prompts(*[4] * 6)
    plain = run(Sampler(decoder, **limits), params, prompts)
    strings = [decode(plain[0].completion_ids[9:11]), decode(plain[1].completion_ids[20:21])]
    stopped = run(Sampler(decoder, **limits, stop_strings=strings, decode=decode, max_rows=4), params, prompts)
    for whole, cut in zip(plain, stopped, strict=True):
        text = decode(whole.completion_ids)
        ends = [text.find(string) + len(string) for string in strings if string in text]
        assert decode(cut.completion_ids) == text[: min(ends, default=len(text))]
        assert cut.finish_reason == ("stop" if ends else "length")
        if ends:
            assert decode(cut.completion_ids)[slice(*cut.stop_string_span)] in strings
            assert cut.text(decode) == text[: cut.stop_string_span[0]]


def test_stop_tokens_that_the_model_does_not_have_are_refused(decoder, params):
    limits = LIMITS | {"stop_token_ids": (VOCAB, VOCAB + 5)}
    with pytest.raises(ValueError, match=r"stop tokens \[23, 28\] are all outside the model's vocabulary of 23"):
        Sampler(decoder, **limits).prepare(params)
    Sampler(decoder, **LIMITS | {"stop_token_ids": (3, VOCAB)}).prepare(params)  # a tokenizer's end token beside it


def test_bf16_samples_near_the_float32_distribution(decoder, params):
    bf16 = models.Decoder(CONFIG, rngs=nnx.Rngs(0), compute_dtype="bfloat16")
    sampler = Sampler(bf16, max_prompt_tokens=8, max_new_tokens=10, stop_token_ids=(), chunk_tokens=4)
    for c in run(sampler, params, make_prompts(3, 8, 5)):
        full_TV = rescored(decoder, c.token_ids, 1.0)[c.prompt_length - 1 :]
        expected = full_TV[np.arange(10), c.completion_ids]
        np.testing.assert_allclose(c.sampler_logprobs, expected, atol=0.3, rtol=0)
        assert np.abs(c.sampler_logprobs - expected).max() > 1e-5  # it did compute in bf16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": make_prompts(3, 21)}, r"prompt 1 has 21 tokens, expected 1 to 20: raise max_prompt_tokens"),
        ({"prompts": make_prompts(3, 0)}, r"prompt 1 has 0 tokens"),
        ({"prompts": [[1, 2], [4, VOCAB, 1]]}, r"prompt 1, token 1: id 23 is outside the model's vocabulary of 23"),
        ({"prompts": [[1, -1], [4]]}, r"prompt 0, token 1: id -1 is outside"),
        ({"prompts": [[1.5, 2.0], [4]]}, r"prompt 0: expected a list of token ids, got float64"),
        ({"seeds": [1]}, r"one integer seed for each of 2 prompts, got int64 of shape \(1,\)"),
        ({"seeds": [1, -1]}, r"seeds must be in \[0, 2\^32\), got -1 to 1"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0.0; for the most likely tokens use greedy=True"),
        ({"temperature": float("nan")}, r"temperature must be above 0, got nan"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_computed(sampler, params, change, message):
    arguments = {"prompts": make_prompts(3, 4), "seeds": [1, 2], "temperature": 1.0} | change
    weights = sampler.prepare(params)
    with pytest.raises(ValueError, match=message):
        sampler.sample(weights, arguments.pop("prompts"), **arguments)


def test_wrong_sizes_are_refused(decoder):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        Sampler(decoder, max_prompt_tokens=4, max_new_tokens=0, stop_token_ids=())
    with pytest.raises(ValueError, match="num_candidates must be at most the vocabulary's 23, got 24"):
        Sampler(decoder, max_prompt_tokens=4, max_new_tokens=1, stop_token_ids=(), num_candidates=24).prepare(
            nnx.split(decoder)[1]
        )
    for options, message in (
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_new_tokens": 41}, "above max_new_tokens"),
        ({"stop_strings": ["x"]}, "need decode"),
        ({"stop_strings": ["x", ""], "decode": str}, r"an empty stop string would end every completion: \['x', ''\]"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampler(decoder, **LIMITS, **options)
    sampler = Sampler(decoder, **LIMITS)
    weights = sampler.prepare(nnx.split(decoder)[1])
    with pytest.raises(ValueError, match="from 1 to the sampler's 40"):
        sampler.sample(weights, make_prompts(2), seeds=[0], temperature=1.0, max_new_tokens=[41])


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_prepared_weights_are_cast_once_and_norms_stay_float32(params, compute_dtype):
    decoder = models.Decoder(CONFIG, rngs=nnx.Rngs(0), compute_dtype=compute_dtype)
    sampler = Sampler(decoder, **LIMITS)
    weights = sampler.prepare(params)
    for layer in weights.decode.layers:
        for name, x in layer.items():
            assert x.dtype == ("float32" if "norm" in name else compute_dtype), name
    casts = []
    sampler._programs.cast = lambda *_: casts.append(1)
    first, again = (
        [(c.index, *c.token_ids) for c in sampler.sample(weights, make_prompts(3, 5), seeds=[1, 2], temperature=1.0)]
        for _ in range(2)
    )
    assert first == again and not casts


def test_no_prompts_give_no_completions(sampler, params):
    assert list(sampler.sample(sampler.prepare(params), [], seeds=[], temperature=1.0)) == []


def test_parameters_that_are_not_finite_are_an_error_and_not_a_sample(sampler, params):
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(FloatingPointError, match="request 0, sampled token 0: the model's log-prob is nan"):
        list(sampler.sample(sampler.prepare(broken), make_prompts(3), seeds=[0], temperature=1.0))


EIGHT_DEVICES = """
import jax, numpy as np
from flax import nnx
from jdistill import models
from jdistill.config import MeshSection
from jdistill.rollout.sampler import Sampler
from jdistill.models import param_shardings
from jdistill.student.sharding import make_mesh

config = models.DecoderConfig(
    family="qwen3", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position_embeddings=128, qk_norm=True, initializer_range=0.3,
)
assert jax.device_count() == 8
decoder = models.random_init(config, seed=0)
graphdef, params = nnx.split(decoder)
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 64, n) for n in (3, 9, 5, 1, 7)]  # five rows: not a multiple of the shards

def run(params, mesh):
    sampler = Sampler(
        graphdef, max_prompt_tokens=9, max_new_tokens=11, stop_token_ids=(3,), num_candidates=2, chunk_tokens=4,
        mesh=mesh,
    )
    completions = list(sampler.sample(sampler.prepare(params), prompts, seeds=np.arange(5), temperature=1.0))
    return sorted(completions, key=lambda c: c.index)

one = run(params, None)
for section in (MeshSection(data=2, fsdp=2, tensor=2), MeshSection(data=1, fsdp=8)):
    mesh = make_mesh(section)
    eight = run(jax.device_put(params, param_shardings(decoder, mesh)), mesh)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.candidate_ids, b.candidate_ids)
        np.testing.assert_allclose(a.sampler_logprobs, b.sampler_logprobs, atol=1e-5)
print("equal")
"""


def test_eight_devices_sample_the_same_tokens_as_one():
    assert run_on_devices(8, EIGHT_DEVICES).endswith("equal\n")
