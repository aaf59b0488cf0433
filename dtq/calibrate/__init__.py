# SPDX-License-Identifier: Apache-2.0
"""Run the float model once and remember what every transform and solver may ask."""
