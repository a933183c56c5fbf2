"""MLflow: one parent run per experiment, one child per stage; patience with its stores."""
