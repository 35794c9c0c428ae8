"""Metrics, intervals, calibration, baselines, slices, gates and the report page."""
