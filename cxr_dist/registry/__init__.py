"""From a run's checkpoint to a model that others load: MLflow folder, registered version, champion, model card, ONNX."""
