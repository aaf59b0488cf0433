# SPDX-License-Identifier: Apache-2.0
"""Linear algebra: Hadamard rotations and Cholesky factors."""
