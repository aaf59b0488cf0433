# SPDX-License-Identifier: Apache-2.0
"""What a user asks for: names, files and overrides become a ``Recipe``."""

from dtq.recipe.resolve import Recipe

__all__ = ["Recipe"]
