"""Data: Megatron's `.bin/.idx` files and index maps, tokenizers, text sources, and the Grain loader. Plain numpy."""

# SPDX-License-Identifier: Apache-2.0
