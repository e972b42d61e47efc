"""The export of a run's student: ONNX, int8, plain timm, a model card, and a model in MLflow's registry."""
