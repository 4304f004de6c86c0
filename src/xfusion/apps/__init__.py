"""Thin shells over the library: nothing imports them."""
