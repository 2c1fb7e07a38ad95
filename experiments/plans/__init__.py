"""One file per plan; each defines `PLAN`."""
