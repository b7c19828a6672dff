"""Recipes: YAML read strictly, with the place of every value kept for error messages."""
