"""MLflow models: registered, compared, served."""
