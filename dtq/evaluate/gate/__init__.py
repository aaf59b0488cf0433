# SPDX-License-Identifier: Apache-2.0
"""The gate: a test whether a candidate is worse than a baseline by more than a margin."""
