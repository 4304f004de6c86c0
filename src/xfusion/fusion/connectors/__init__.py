"""Connectors: from the tokens of a medium, or features of a frozen encoder, to rows of the model's width; a file each."""
