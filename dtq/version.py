# SPDX-License-Identifier: Apache-2.0
"""Which dtq this is; figures are recorded with it."""

__version__ = "0.1.0"
