"""Experts: the density estimators of x given θ that a likelihood proxy mixes."""
