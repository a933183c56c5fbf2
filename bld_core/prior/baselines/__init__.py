"""The priors that Table 5 compares binary diffusion with."""
