"""What vision towers share."""

# SPDX-License-Identifier: Apache-2.0
