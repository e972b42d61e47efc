"""The model that MLflow runs: it maps encoded images to labels and probabilities. MLflow reads this file as code.

It does not import ktray: the model's artifacts contain `ktray.jobs.export.predict` as a file.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class StudentModel(PythonModel):
    """Classifies a column of encoded images (JPEG, PNG, ...)."""

    def load_context(self, context: Any) -> None:
        """Open the ONNX file."""
        spec = importlib.util.spec_from_file_location("ktray_exported_predict", context.artifacts["predict"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.classifier = module.Classifier(context.artifacts["model"])
        self.png = module.png

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return ``label``, ``probability`` and ``probabilities`` (by class name) for each row; if an image may have
        several classes, ``labels`` and ``probabilities``; for segmentation, ``mask`` (PNG) and ``shares`` (by class
        name).

        Raises:
            ValueError: a row is not a usable image.
        """
        images = model_input.iloc[:, 0].tolist()
        if self.classifier.maps:
            masks = self.classifier.predict(images)
            return pd.DataFrame([{**one, "mask": self.png(one["mask"])} for one in masks], columns=["mask", "shares"])
        columns = ["label", "probability"] if self.classifier.thresholds is None else ["labels"]
        return pd.DataFrame(self.classifier.predict(images), columns=[*columns, "probabilities"])


set_model(StudentModel())
