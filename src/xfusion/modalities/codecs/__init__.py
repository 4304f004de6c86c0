"""One file per codec. Import a codec from its own file, so that only the codecs in use are loaded."""
