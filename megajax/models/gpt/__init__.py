"""The GPT family: decoder-only language models."""

# SPDX-License-Identifier: Apache-2.0
