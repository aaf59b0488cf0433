# SPDX-License-Identifier: Apache-2.0
"""Estimates of memory, disk and time, made before a run starts."""
