"""The method on plain tensors, without Lightning: read this first."""
