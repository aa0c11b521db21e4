"""Recipes: which steps run, with which knobs, and the exceptions to them."""

from bitport.recipe.model import Override, Recipe, StepSpec

__all__ = ["Override", "Recipe", "StepSpec"]
