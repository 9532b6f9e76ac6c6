"""Distributed hyperparameter search: Ray Tune, ASHA, honest test accuracy."""
