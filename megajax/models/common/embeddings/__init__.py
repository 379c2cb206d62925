"""Token, position and rotary embeddings."""

# SPDX-License-Identifier: Apache-2.0
