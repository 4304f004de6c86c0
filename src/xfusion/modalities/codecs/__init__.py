"""One file per codec. Import a codec from its own file, so that only what is used is loaded."""
