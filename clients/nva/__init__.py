"""NVA: deterministic Gaussian search for modes."""
