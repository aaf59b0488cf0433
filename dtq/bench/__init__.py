# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: time quantized layers and models against float ones and those of other libraries."""
