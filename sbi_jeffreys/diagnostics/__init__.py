"""Diagnostics of a posterior: held-out report, calibration, verdicts, and figures."""
