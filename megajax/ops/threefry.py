"""Any part of the random numbers that `jax.random` makes for a whole array, without the rest.

JAX's threefry2x32 makes the number of each element of the key and of the element's own index, 64 bits.
"""

# SPDX-License-Identifier: Apache-2.0
# All words of 32 bits are int32, whose sums and products wrap around as those of unsigned integers do.
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def is_default() -> bool:
    """Whether `jax.random` makes numbers like that, as it does unless JAX's configuration says otherwise."""
    options = jax.config.values
    return options["jax_default_prng_impl"] == "threefry2x32" and options["jax_threefry_partitionable"]


def words_of(key_data: Array) -> Array:
    """The two words of a key, int32 [2], from its data, uint32 [2]."""
    return jax.lax.bitcast_convert_type(key_data, jnp.int32)


def bits_of_rows(words: Any, row: Any, width: int, column: Any) -> Array:
    """23 random bits for elements (row, column) of an array [rows, width]; all int32. words: those of the key."""
    high, low = times(row, width)
    carry = is_less(low + column, low).astype(jnp.int32)
    first, second = threefry2x32(words[0], words[1], high + carry, low + column)
    return jax.lax.shift_right_logical(first ^ second, 9)


def threshold(probability: float) -> int:
    """Of 2^23 the numbers that `jax.random.bernoulli` takes for true."""
    return math.ceil(float(np.float32(probability)) * 2**23)  # what a uniform number m / 2^23 is compared with


def is_less(a: Array, b: Array) -> Array:
    """Of unsigned words."""
    lowest = jnp.int32(-(2**31))
    return (a ^ lowest) < (b ^ lowest)


def times(a: Array, b: int) -> tuple[Array, Array]:
    """High and low word of the product of an unsigned word and a number below 2^31, in halves of 16 bits."""
    a_high, a_low = jax.lax.shift_right_logical(a, 16), a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + jax.lax.shift_right_logical(a_low * b_low, 16)
    rest = (middle & 0xFFFF) + a_low * b_high
    return a_high * b_high + jax.lax.shift_right_logical(middle, 16) + jax.lax.shift_right_logical(rest, 16), a * b


def threefry2x32(key: Array, other_key: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Threefry-2x32 in 20 rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    keys = key, other_key, key ^ other_key ^ 0x1BD11BDA
    x, y = x + keys[0], y + keys[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x += y
            y = x ^ (jax.lax.shift_left(y, turn) | jax.lax.shift_right_logical(y, 32 - turn))
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + (group + 1)
    return x, y
