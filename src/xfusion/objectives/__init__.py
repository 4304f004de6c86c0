"""One file per objective, with corrupt, loss and sample together, so that time and signs are defined once."""
