"""The BERT family: bidirectional encoders trained to fill in masked tokens."""

# SPDX-License-Identifier: Apache-2.0
