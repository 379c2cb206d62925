"""The T5 family: an encoder and a decoder, trained to write what is missing from a text."""

# SPDX-License-Identifier: Apache-2.0
