"""``bayesfed partition``: who would hold what, before anything is trained."""
