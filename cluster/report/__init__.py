"""An experiment as one page."""
