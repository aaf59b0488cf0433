# SPDX-License-Identifier: Apache-2.0
"""The version of dtq: of the package, and recorded with every measurement."""

__version__ = "0.1.0"
