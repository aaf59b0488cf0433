# SPDX-License-Identifier: Apache-2.0
"""Metrics of single images, of videos and of image sets."""
