# SPDX-License-Identifier: Apache-2.0
"""The format on disk: a diffusers folder with safetensors files and their config."""
