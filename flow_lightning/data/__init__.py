"""Data: image data sets by name or folder, instructions for language models, and what retention is measured on."""
