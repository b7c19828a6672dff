"""optikit: optimize language models for inference by recipe.

A recipe is a list of stages; each stage turns one sealed model directory into the next; the last one deploys; the
report says what every stage cost and what it gained, and proves it.
"""

__version__ = "0.1.0"
