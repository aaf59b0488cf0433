# SPDX-License-Identifier: Apache-2.0
"""Load a diffusers pipeline, call it, and record the calls of its transformer."""
