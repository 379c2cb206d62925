"""Parts of random arrays against the arrays that JAX makes whole."""

# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.ops.attention import DropoutRecord, attention_dropout_kept
from megajax.ops.threefry import bits_of_rows, is_default, threshold, times, words_of


@pytest.mark.parametrize("rate", [0.1, 0.5, 1 / 3])
def test_rows_are_those_of_bernoulli(rate):
    assert is_default()
    key = jax.random.key(7)
    want = jax.random.bernoulli(key, 1 - rate, (6, 10))
    words = words_of(jax.random.key_data(key))
    bits = bits_of_rows(words, jnp.arange(2, 5, dtype=jnp.int32)[:, None], 10, jnp.arange(10))
    np.testing.assert_array_equal(bits < threshold(1 - rate), want[2:5])


@pytest.mark.parametrize(("a", "b"), [(2**32 - 1, 2**31 - 1), (2**31, 3), (123_456_789, 987_654_321), (7, 11)])
def test_an_index_has_64_bits(a, b):
    high, low = times(jnp.asarray(a, jnp.uint32).astype(jnp.int32), b)
    assert (int(high) % 2**32) * 2**32 + int(low) % 2**32 == a * b


def test_attention_dropout_of_some_samples_heads_and_queries():
    B, N, S, T = 3, 4, 6, 8
    key = jax.random.key(1)
    whole = attention_dropout_kept(key, 0.3, (B, N, S, T))
    record = DropoutRecord.of(key, 0.3, (B, N, S, T))
    np.testing.assert_array_equal(record.kept(B, N, S), whole)
    np.testing.assert_array_equal(record.of_sample(1).kept(2, N, S), whole[1:])
    part = DropoutRecord.of(key, 0.3, (B, N, S, T), first_row=(1 * N + 2) * S + 3)
    np.testing.assert_array_equal(part.kept(1, 2, 3), whole[1:2, 2:, 3:])
