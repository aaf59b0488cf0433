# SPDX-License-Identifier: Apache-2.0
"""The report of ``dtq eval``: one self-contained HTML page."""
