"""Measurements: perplexity, divergence, speed, cost, and the statistics that make them hold up."""
