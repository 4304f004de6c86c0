"""Frozen encoders: pictures -> features. One file per encoder."""
