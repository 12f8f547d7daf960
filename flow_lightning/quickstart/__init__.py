"""Photographs and word problems that come in packages or are made, for a first try without downloads."""
