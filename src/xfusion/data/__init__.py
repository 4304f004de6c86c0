"""Samples, sources and packing: what a model reads."""
