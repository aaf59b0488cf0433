# SPDX-License-Identifier: Apache-2.0
"""Metrics of single samples, of videos and of whole image sets."""
