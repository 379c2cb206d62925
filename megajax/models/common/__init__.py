"""What language models share: embeddings, output layer, loss."""

# SPDX-License-Identifier: Apache-2.0
