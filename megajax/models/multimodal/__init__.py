"""Language models that see: a vision tower, a projection, a language model."""

# SPDX-License-Identifier: Apache-2.0
