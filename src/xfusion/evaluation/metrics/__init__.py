"""One file per metric: tensors or strings in, numbers out, no model."""
