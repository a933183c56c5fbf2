"""Jobs on images: shards made, streamed to training, encoded to bits."""
