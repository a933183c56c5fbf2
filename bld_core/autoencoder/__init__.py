"""The binary autoencoder (Section 3): images to bits and back."""
