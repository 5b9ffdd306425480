"""Reports computed from a run's ledger and the metrics files that it names."""
