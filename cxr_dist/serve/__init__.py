"""The model as others load it: what travels with a logged MLflow model. Nothing in it knows Ray, storage or this job."""
