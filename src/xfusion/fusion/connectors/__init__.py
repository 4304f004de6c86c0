"""Connectors: from the tokens of a medium to the rows of the model's width that words read, a file each."""
