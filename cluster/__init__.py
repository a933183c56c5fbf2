"""cluster is many machines: everything that imports Ray or MLflow."""
