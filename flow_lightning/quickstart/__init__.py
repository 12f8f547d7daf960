"""Photographs, word problems and weights that come in packages, for a first try without downloads."""
