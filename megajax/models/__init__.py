"""Model families, one folder each, and the registry that names them."""

# SPDX-License-Identifier: Apache-2.0
