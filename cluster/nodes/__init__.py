"""The machines: their labels, whether they hold the work, and how it waits for them."""
