"""Generation from a trained model."""

# SPDX-License-Identifier: Apache-2.0
