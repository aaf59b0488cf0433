# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, and strict parsing of untrusted documents."""
