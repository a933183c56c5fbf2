"""Files anywhere, each with a commit point; patience with servers; published weights."""
