"""Shape annotations are checked in every test process: an array of another shape raises in each package."""

import jax.numpy as jnp
import jaxtyping
import pytest

from jdistill.losses import masked
from jdistill.models import attention
from jdistill.rollout import draw
from jdistill.student import logprobs


def test_a_wrong_shape_raises_in_losses():
    assert masked.masked_mean(jnp.ones((2, 3)), jnp.ones((2, 3), bool)) == 1
    with pytest.raises(jaxtyping.TypeCheckError, match="mask"):
        masked.masked_mean(jnp.ones((2, 3)), jnp.ones((2, 4), bool))


def test_a_wrong_shape_raises_in_models():
    keys = values = jnp.ones((1, 4, 2, 8))
    assert attention.causal_attention(jnp.ones((1, 4, 2, 8)), keys, values).shape == (1, 4, 2, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="k_BSKH"):
        attention.causal_attention(jnp.ones((1, 5, 2, 8)), keys, values)


def test_a_wrong_shape_raises_in_rollout():
    logits, seeds = jnp.zeros((2, 5)), jnp.zeros(2, jnp.uint32)
    tokens, _ = draw.draw_tokens(logits, seeds, jnp.zeros(2, jnp.int32), greedy=True)
    assert tokens.shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError, match="position_B"):
        draw.draw_tokens(logits, seeds, jnp.zeros(3, jnp.int32), greedy=True)


def test_a_wrong_shape_raises_in_student():
    targets, mask = jnp.zeros((2, 3), int), jnp.ones((2, 4), bool)
    options = {"temperature": 1.0, "chunk_tokens": 4}
    logprobs.target_logprobs(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), targets, mask[:, :3], **options)
    with pytest.raises(jaxtyping.TypeCheckError, match="loss_mask"):
        logprobs.target_logprobs(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), targets, mask, **options)
