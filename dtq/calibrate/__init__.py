# SPDX-License-Identifier: Apache-2.0
"""Calibration: run the float model and collect the statistics that transforms and solvers use."""
