"""Modules: the contract with FLOW, image classification on it, pre-trained weights, optimizer and schedule."""
