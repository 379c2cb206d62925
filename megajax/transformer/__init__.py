"""Linen modules of the transformer: they own parameters and logical axes and call into ops."""

# SPDX-License-Identifier: Apache-2.0
