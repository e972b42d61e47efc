"""The export of a run's student: ONNX, further formats, plain timm, a model card, and a model in MLflow's registry."""
