"""Callbacks for Trainer: probe, weights, refitted head, retention report, and the sweep that they share."""
