"""Data: image data sets by name or folder, their transforms, and the images that retention is measured on."""
