"""The page: chat, gallery, pictures dropped on it, a look inside, and comparisons, in a browser."""
