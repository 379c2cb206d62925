"""What every language model does after its last layer."""

# SPDX-License-Identifier: Apache-2.0
