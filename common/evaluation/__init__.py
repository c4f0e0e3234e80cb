"""Evaluation of a latent space: probes, neighbors, geometry, comparison."""
