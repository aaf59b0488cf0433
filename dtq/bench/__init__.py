# SPDX-License-Identifier: Apache-2.0
"""Time quantized layers next to float layers and to those of other libraries."""
