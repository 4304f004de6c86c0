"""The page: chat, gallery, pictures dropped on it, a look inside, and comparisons, in a browser."""

import os

# Read when gradio is imported: no analytics, no share links, no run history.
os.environ.update({"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False"})
