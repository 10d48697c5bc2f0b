"""``bayesfed compare``: methods x seeds x settings with one budget, as one table and one report."""
