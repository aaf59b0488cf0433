# SPDX-License-Identifier: Apache-2.0
"""Processes, tasks and the run directory: how a run is shared, interrupted and resumed."""
