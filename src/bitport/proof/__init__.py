"""Times, counts and compares: what was kept and what was lost."""
