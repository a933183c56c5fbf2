"""The transformer prior (Section 4.2) and the seam behind which other priors stand."""
