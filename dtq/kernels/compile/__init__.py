# SPDX-License-Identifier: Apache-2.0
"""How the C++ and CUDA code is compiled and loaded."""
