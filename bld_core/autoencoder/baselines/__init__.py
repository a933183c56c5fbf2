"""The latents that Table 4 compares binary codes with."""
