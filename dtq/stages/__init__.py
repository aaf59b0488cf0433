# SPDX-License-Identifier: Apache-2.0
"""The stages of quantization, one file each."""
