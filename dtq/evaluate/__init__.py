# SPDX-License-Identifier: Apache-2.0
"""Compare a candidate with its float model on the same seeds."""
