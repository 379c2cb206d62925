"""Device mesh and the one table from logical axes to mesh axes."""

# SPDX-License-Identifier: Apache-2.0
