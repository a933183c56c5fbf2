"""Studies: what one choice does to the prior and its samples (Tables 5, 7, Figs. 4, 7)."""
