"""What was trained, in the browser and behind an API."""
