"""One short file per published system; the folder is the list."""
