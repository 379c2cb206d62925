"""RETRO: a decoder that reads what was retrieved for its text so far (arXiv:2112.04426)."""

# SPDX-License-Identifier: Apache-2.0
