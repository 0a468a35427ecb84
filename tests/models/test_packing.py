"""Packing of ragged rows: the place of each token, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.models.packing import pack_rows


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([1, 2, 3]))
def test_every_real_token_comes_back_and_padding_is_zero(lengths, num_groups):
    lengths_B = np.array(lengths * num_groups)
    x_BSD = np.arange(1, lengths_B.size * 9 * 2 + 1).reshape(-1, 9, 2)
    packing = pack_rows(lengths_B, 9, num_groups=num_groups)
    line_GPD = packing.pack(x_BSD)
    assert np.count_nonzero(line_GPD) == 2 * lengths_B.sum()
    real_BS1 = (np.arange(9) < lengths_B[:, None])[..., None]
    np.testing.assert_array_equal(packing.unpack(line_GPD), np.where(real_BS1, x_BSD, 0))


def test_tokens_of_a_group_are_contiguous():
    packing = pack_rows([2, 1, 3, 0], 4, num_groups=2)
    tokens_BS = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [4, 5, 6, 0], [0, 0, 0, 0]])
    assert packing.pack(tokens_BS).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_gradients_are_those_of_plain_indexing():
    packing = pack_rows([3, 0, 2, 4], 4, num_groups=2)
    rng = np.random.default_rng(0)
    x_BSD, weights = rng.normal(size=(4, 4, 3)), rng.normal(size=(2, packing.token_of.shape[1], 3))

    def plain(x_BSD):
        x_GBSD = jnp.concatenate([x_BSD.reshape(2, 8, 3), jnp.zeros((2, 1, 3))], axis=1)
        return x_GBSD[jnp.arange(2)[:, None], packing.token_of]

    def total(pack):
        return lambda x_BSD: jnp.sum(jnp.sin(pack(x_BSD)) * weights)

    np.testing.assert_allclose(jax.grad(total(packing.pack))(x_BSD), jax.grad(total(plain))(x_BSD), atol=1e-6)
    line = packing.pack(x_BSD)
    back = jax.grad(lambda line: jnp.sum(packing.unpack(line) * x_BSD))(line)
    np.testing.assert_allclose(back, line, atol=1e-6)  # what nothing is at gets no gradient


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3], 4, 2), "3 rows do not split into 2 groups"),
        (([1, 5], 4, 1), "rows of 1 to 5 tokens, expected 0 to 4"),
        (([-1], 4, 1), "rows of -1 to -1 tokens"),
        (([4, 4], 4, 1, 7), "8 tokens do not fit 7 places"),
    ],
)
def test_errors_name_the_wrong_rows(arguments, message):
    lengths, row_length, num_groups, *places = arguments
    with pytest.raises(ValueError, match=message):
        pack_rows(lengths, row_length, num_groups=num_groups, places=places[0] if places else None)
