"""Pure functions on arrays: the mathematics of every layer, without parameters."""

# SPDX-License-Identifier: Apache-2.0
