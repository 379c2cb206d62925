"""Vision towers, and the families that train one: an image tower with a text tower, and an agglomerative one."""

# SPDX-License-Identifier: Apache-2.0
