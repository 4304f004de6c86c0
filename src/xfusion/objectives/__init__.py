"""One file per objective: corrupt, loss and sample together, so that time and signs are defined once."""
