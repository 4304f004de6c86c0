"""Thin applications on top of the library: the library does not import them."""
