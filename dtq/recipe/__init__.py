# SPDX-License-Identifier: Apache-2.0
"""What a user asks for: names, files and overrides become a ``Recipe``, and that a plan."""

from dtq.recipe.recipe import Recipe, find

__all__ = ["Recipe", "find"]
