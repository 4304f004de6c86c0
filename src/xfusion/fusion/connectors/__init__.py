"""Connectors, one per file: map a medium's tokens, or features of a frozen encoder, to rows of the model's width."""
