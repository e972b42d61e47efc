"""A run's student as something to deploy: ONNX, int8, plain timm, a model card, and a model in MLflow's registry."""
